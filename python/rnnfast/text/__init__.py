"""Text in, token numbers out: vocabularies and corpora. Knows nothing of models."""

from .corpus import Corpus, CorpusError, Split, build_corpus, default_text, read_text
from .vocabulary import (
    ByteVocabulary,
    CharVocabulary,
    Vocabulary,
    vocabulary_from_json,
)

__all__ = [
    "ByteVocabulary",
    "CharVocabulary",
    "Corpus",
    "CorpusError",
    "Split",
    "Vocabulary",
    "build_corpus",
    "default_text",
    "read_text",
    "vocabulary_from_json",
]
