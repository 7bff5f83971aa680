"""Reading training text and cutting it into the three splits.

The default text is the standard library of the Python that runs: real text that people wrote, some
    ten million characters of it, on every machine and without a download.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .vocabulary import Vocabulary, learn_vocabulary

DEFAULT_NAME = "the Python standard library"
SPLIT_NAMES = ("train", "valid", "test")
VALID_SHARE = 0.05
TEST_SHARE = 0.05
WHITE_SPACE = re.compile(r"\s")

# Folders of the standard library that aren't its own text: installed packages, and tests and
# tables, which hold much data and little prose or code.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


class CorpusError(ValueError):
    """A text that can't be read or is too small; the message is one line for the user."""


@dataclass(frozen=True)
class Split:
    """One contiguous part of a text.

    Attributes:
        tokens: token numbers, int32, shape (N,).
        characters: length of the same text in characters (bytes at the byte level), the unit of
            bits per character.
    """

    tokens: torch.Tensor
    characters: int

    def unknown_share(self, vocabulary: Vocabulary) -> float:
        """The fraction of the tokens that the vocabulary doesn't know."""
        if vocabulary.unknown is None or len(self.tokens) == 0:
            return 0.0
        return (self.tokens == vocabulary.unknown).double().mean().item()


@dataclass(frozen=True)
class Corpus:
    """A text with its vocabulary, cut into training, validation and test splits.

    Attributes:
        name: what to call the text in a report.
        vocabulary: learned from the training split.
        train, valid, test: the splits, in the order of the text.
        fingerprint: SHA-256 of all tokens; two processes that train one model compare it.
    """

    name: str
    vocabulary: Vocabulary
    train: Split
    valid: Split
    test: Split
    fingerprint: str


def build_corpus(
    paths: Sequence[str | Path],
    level: str,
    *,
    max_words: int = 10_000,
    vocabulary: Vocabulary | None = None,
) -> Corpus:
    """Reads text files and cuts their text into 90 % training, 5 % validation and 5 % test.

    Args:
        paths: files, read one after the other; none means the default text.
        level: `char`, `byte` or `word`.
        max_words: largest size of a word vocabulary.
        vocabulary: that of an earlier run; None learns one from the training split.

    Raises:
        CorpusError: a file can't be read or isn't text, or a split would be empty.
    """
    text = read_text(paths, level) if paths else default_text(level)
    name = ", ".join(map(str, paths)) if paths else DEFAULT_NAME
    parts = split_text(text, level)
    if vocabulary is None:
        vocabulary = learn_vocabulary(level, parts[0], max_words)
    splits = [encode_split(part, vocabulary) for part in parts]
    for split_name, split in zip(SPLIT_NAMES, splits, strict=True):
        if len(split.tokens) < 2:
            raise CorpusError(
                f"{name} is too short: its {split_name} split has {len(split.tokens)} tokens and "
                "needs at least 2"
            )
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.tokens.numpy().tobytes())
    return Corpus(name, vocabulary, *splits, fingerprint=digest.hexdigest())


def encode_split(text: str | bytes, vocabulary: Vocabulary) -> Split:
    """The tokens of one text."""
    return Split(torch.from_numpy(vocabulary.encode(text)), len(text))


def split_text(text: str | bytes, level: str) -> list[str | bytes]:
    """Cuts `text` into training, validation and test parts, contiguous and in this order.

    A word text is cut after the next white space, so that no word is cut in two.
    """
    cuts = [
        round(len(text) * (1 - VALID_SHARE - TEST_SHARE)),
        round(len(text) * (1 - TEST_SHARE)),
    ]
    if level == "word":
        gaps = [WHITE_SPACE.search(text, cut) for cut in cuts]
        cuts = [gap.end() if gap else len(text) for gap in gaps]
    first, second = cuts
    return [text[:first], text[first:second], text[second:]]


def read_text(paths: Iterable[str | Path], level: str) -> str | bytes:
    """The text of several files one after the other: str, or at the byte level bytes.

    Raises:
        CorpusError: a file is missing, unreadable, empty, or not UTF-8 where text is needed.
    """
    parts = [read_bytes(Path(path)) for path in paths]
    if level == "byte":
        return b"".join(parts)
    return "".join(decode_utf8(part, Path(path)) for part, path in zip(parts, paths, strict=True))


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        CorpusError: the file is missing, unreadable or empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read data file {path}: {error.strerror or error}") from error
    if not content:
        raise CorpusError(f"data file {path} is empty")
    return content


def decode_utf8(content: bytes, path: Path) -> str:
    """UTF-8 decoded, without a byte order mark.

    Raises:
        CorpusError: `content` isn't UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"data file {path} is not UTF-8 text (byte {error.start} is "
            f"0x{content[error.start]:02x}); --level byte reads any file"
        ) from error


def default_text(level: str) -> str | bytes:
    """The sources of the running Python's standard library, one after the other.

    The files stand in the order of a hash of their names: the same on every machine with the same
    Python, and unlike the alphabetical order it doesn't put whole packages into the test split.

    Raises:
        CorpusError: this Python has no sources on disk.
    """
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        (
            path.relative_to(library).as_posix()
            for path in library.rglob("*.py")
            if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts)
        ),
        key=lambda name: hashlib.sha256(name.encode()).digest(),
    )
    parts = [content for name in names if (content := (library / name).read_bytes())]
    if not parts:
        raise CorpusError(f"this Python has no library sources in {library}; give --data FILE")
    if level == "byte":
        return b"".join(parts)
    # Python's own sources are UTF-8 but for a few that declare another encoding.
    return "".join(part.decode("utf-8", "ignore") for part in parts)
