"""Vocabularies: which symbols a language model knows, and the number of each.

The three levels differ in what a symbol is: a character, a byte, or a word (words.py). All of them
are learned from training text only, so that a validation text can hold symbols never seen before;
those become the *unknown* symbol, except at the byte level, where nothing is unknown.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

LEVELS = ("char", "byte", "word")

# A character rarer than one in a million is unknown: it can't be learned from so few examples,
#     every such character makes the softmax dearer, and the unknown symbol needs some examples
#     itself. In texts under a million characters every character is kept.
RARE_CHARACTER = 1e-6

UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Vocabulary(ABC):
    """Maps text to token numbers 0 .. V-1 and back."""

    level: ClassVar[str]
    #: token number of what the vocabulary doesn't know; None when there is no such thing.
    unknown: int | None

    @abstractmethod
    def __len__(self) -> int:
        """V, the number of symbols, the unknown one included."""

    @abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray:
        """Token numbers of `text`, int32, shape (N,)."""

    @abstractmethod
    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The text of token numbers as bytes: UTF-8, or whatever bytes a byte model has made.

        Raises:
            IndexError: a token number outside 0 .. V-1.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers; bytes that aren't UTF-8 show as U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def beginning(self) -> list[int]:
        """The tokens after which a text may begin: the end of a line, or if that is unknown, the
        first symbol there is."""
        tokens = self.encode("\n").tolist()
        return tokens if tokens != [self.unknown] else [1]

    def never_generated(self) -> tuple[int, ...]:
        """The tokens that stand for no text of their own: the unknown symbol, if there is one."""
        return () if self.unknown is None else (self.unknown,)

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `vocabulary_from_json` builds an equal vocabulary."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_json() == other.to_json()

    __hash__ = None


class ByteVocabulary(Vocabulary):
    """The 256 bytes: any file can be read, and nothing is unknown."""

    level = "byte"
    unknown = None

    def __len__(self) -> int:
        return 256

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, str):
            # Undecodable bytes of a command line arrive as lone surrogates: give them back as
            #     bytes.
            text = text.encode("utf-8", "surrogateescape")
        return np.frombuffer(text, dtype=np.uint8).astype(np.int32)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        check_token_range(tokens, len(self))
        return bytes(tokens)

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level}


class CharVocabulary(Vocabulary):
    """Unicode characters in order of code point; token 0 is the unknown character.

    Args:
        characters: the known characters, each once.

    Raises:
        ValueError: a character stands twice.
    """

    level = "char"
    unknown = 0

    def __init__(self, characters: str):
        if len(set(characters)) != len(characters):
            raise ValueError("characters of a vocabulary must be distinct")
        self.characters = characters
        points = code_points(characters)
        self._token_of_point = np.zeros(int(points.max(initial=0)) + 1, dtype=np.int32)
        self._token_of_point[points] = np.arange(1, len(characters) + 1, dtype=np.int32)
        self._symbols = UNKNOWN_CHARACTER + characters

    @classmethod
    def learn(cls, text: str) -> CharVocabulary:
        """The characters of `text` but for the rarest (`RARE_CHARACTER`)."""
        points, counts = np.unique(code_points(text), return_counts=True)
        known = points[counts >= RARE_CHARACTER * len(text)]
        return cls("".join(map(chr, known.tolist())))

    def __len__(self) -> int:
        return len(self._symbols)

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        points = code_points(text)
        within = points < len(self._token_of_point)
        return np.where(within, self._token_of_point[np.where(within, points, 0)], 0).astype(
            np.int32
        )

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        check_token_range(tokens, len(self))
        return "".join(self._symbols[token] for token in tokens).encode()

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level, "characters": self.characters}


def code_points(text: str) -> np.ndarray:
    """Unicode code points of `text`, uint32, shape (characters,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def check_token_range(tokens: Sequence[int], size: int) -> None:
    """Refuses token numbers that would silently count from the end or overflow.

    Raises:
        IndexError: a token number outside 0 .. size-1.
    """
    for token in tokens:
        if not 0 <= token < size:
            raise IndexError(f"token {token} is outside a vocabulary of {size}")


def learn_vocabulary(level: str, text: str | bytes, max_words: int) -> Vocabulary:
    """The vocabulary of a training text.

    Args:
        level: `char`, `byte` or `word`.
        text: bytes at the byte level, else str.
        max_words: largest size of a word vocabulary; the other levels have no use for it.

    Raises:
        ValueError: an unknown level.
    """
    if level == "byte":
        return ByteVocabulary()
    if level == "char":
        return CharVocabulary.learn(text)
    if level == "word":
        from .words import WordVocabulary

        return WordVocabulary.learn(text, max_words)
    raise ValueError(f"level is {level!r}; it must be one of {', '.join(LEVELS)}")


def vocabulary_from_json(record: dict[str, Any]) -> Vocabulary:
    """The inverse of `Vocabulary.to_json`.

    Raises:
        ValueError: the record describes no vocabulary.
    """
    try:
        level = record["level"]
        if level == "byte":
            return ByteVocabulary()
        if level == "char":
            return CharVocabulary(record["characters"])
        if level == "word":
            from .words import WordVocabulary

            return WordVocabulary(record["words"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a vocabulary: {error!r}") from error
    raise ValueError(f"not a vocabulary: level is {level!r}, not one of {', '.join(LEVELS)}")
