"""The word level, on the `tokenizers` library.

A file of its own because only this level needs that library: character and byte models run without
    it.

A word is what stands between white space, and the end of a line is the word `<eos>`: the convention
of the Penn Treebank and WikiText benchmarks (Mikolov et al. 2010), so that perplexities compare
with published ones. White space other than line ends isn't kept.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from .vocabulary import Vocabulary, check_token_range

UNKNOWN_WORD = "<unk>"
END_OF_LINE = "<eos>"


class WordVocabulary(Vocabulary):
    """The most frequent words of a training text; `<unk>` is token 0 and `<eos>` token 1.

    Args:
        words: the known words in the order of their numbers, `<unk>` and `<eos>` first.

    Raises:
        ImportError: the `tokenizers` library isn't installed.
        ValueError: `words` doesn't begin with `<unk>` and `<eos>`, or a word stands twice.
    """

    level = "word"
    unknown = 0

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        if self.words[:2] != [UNKNOWN_WORD, END_OF_LINE]:
            raise ValueError(f"a word vocabulary begins with {UNKNOWN_WORD} and {END_OF_LINE}")
        numbers = {word: number for number, word in enumerate(self.words)}
        if len(numbers) != len(self.words):
            raise ValueError("words of a vocabulary must be distinct")
        self._tokenizer = make_tokenizer(numbers)

    @classmethod
    def learn(cls, text: str, max_words: int) -> WordVocabulary:
        """The `max_words` - 2 most frequent words of `text`; of equally frequent ones, the first in
        order of code points."""
        tokenizer = make_tokenizer({})
        # Of these at most two are <unk> and <eos>, which the trainer counts like other words.
        trainer = import_tokenizers().trainers.WordLevelTrainer(
            vocab_size=max_words, show_progress=False
        )
        tokenizer.train_from_iterator(lines_of(text), trainer)
        numbers = tokenizer.get_vocab()
        learned = [
            word
            for word in sorted(numbers, key=numbers.__getitem__)
            if word not in (UNKNOWN_WORD, END_OF_LINE)
        ]
        return cls([UNKNOWN_WORD, END_OF_LINE, *learned[: max_words - 2]])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        # Line by line, because the library encodes the members of a list on all cores.
        encodings = self._tokenizer.encode_batch_fast(lines_of(text))
        return np.fromiter(
            (token for encoding in encodings for token in encoding.ids), dtype=np.int32
        )

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        check_token_range(tokens, len(self))
        parts: list[str] = []
        for token in tokens:
            if token == 1:
                parts.append("\n")
            else:
                if parts and parts[-1] != "\n":
                    parts.append(" ")
                parts.append(self.words[token])
        return "".join(parts).encode()

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level, "words": self.words}


def lines_of(text: str) -> list[str]:
    """The lines of `text`, each with its line end, cut at line feeds alone (`str.splitlines` also
    cuts at form feeds and others, which stand between words here).
    """
    return list(io.StringIO(text, newline="\n"))


def make_tokenizer(numbers: dict[str, int]) -> Any:
    """A `tokenizers.Tokenizer` that splits at white space and looks words up in `numbers`."""
    library = import_tokenizers()
    tokenizer = library.Tokenizer(library.models.WordLevel(vocab=numbers, unk_token=UNKNOWN_WORD))
    tokenizer.normalizer = library.normalizers.Replace("\n", f" {END_OF_LINE} ")
    tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def import_tokenizers() -> Any:
    """The `tokenizers` library, or an ImportError that names the fix."""
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError(
            "word vocabularies need the tokenizers library: pip install 'rnnfast[cli]'"
        ) from error
    return tokenizers
