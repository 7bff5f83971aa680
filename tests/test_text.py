"""Vocabularies and corpora: what goes in comes out, and what can't be read is refused clearly."""

from __future__ import annotations

import json
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rnnfast.text import (
    ByteVocabulary,
    CharVocabulary,
    CorpusError,
    build_corpus,
    default_text,
    read_text,
    vocabulary_from_json,
)
from rnnfast.text import corpus as corpus_module
from rnnfast.text.vocabulary import RARE_CHARACTER, learn_vocabulary
from rnnfast.text.words import WordVocabulary

PROSE = "the cat sat\non the mat\n\nthe end\n"


@given(st.text())
def test_known_characters_survive_a_round_trip(text):
    vocabulary = CharVocabulary("".join(sorted(set(text))))
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.int32
    assert 0 not in tokens
    # Lone surrogates are characters of Python's but not of UTF-8.
    if text.isprintable():
        assert vocabulary.decode(tokens.tolist()) == text


def test_unknown_characters_become_token_0_and_show_as_u_fffd():
    vocabulary = CharVocabulary("abc")
    assert len(vocabulary) == 4
    assert vocabulary.encode("cab\N{SNOWMAN}\x00a").tolist() == [3, 1, 2, 0, 0, 1]
    assert vocabulary.decode([1, 0, 2]) == "a\N{REPLACEMENT CHARACTER}b"


def test_characters_rarer_than_one_in_a_million_are_unknown():
    # Of two million characters and four, one is rarer than two and three are not.
    common = round(2 / RARE_CHARACTER)
    vocabulary = CharVocabulary.learn("a" * common + "b" + "ccc")
    assert vocabulary.characters == "ac"
    assert CharVocabulary.learn("a" * 1000 + "b").characters == "ab"


@given(st.binary())
def test_bytes_survive_a_round_trip(content):
    vocabulary = ByteVocabulary()
    assert vocabulary.decode_bytes(vocabulary.encode(content).tolist()) == content


def test_a_byte_vocabulary_takes_text_and_the_raw_bytes_of_a_command_line():
    vocabulary = ByteVocabulary()
    assert vocabulary.encode("\N{LATIN SMALL LETTER E WITH ACUTE}").tolist() == [0xC3, 0xA9]
    assert vocabulary.encode(b"\xff".decode("utf-8", "surrogateescape")).tolist() == [0xFF]
    assert vocabulary.unknown is None


def test_words_stand_between_white_space_and_a_line_end_is_a_word():
    vocabulary = WordVocabulary.learn(PROSE, 100)
    tokens = vocabulary.encode(PROSE).tolist()
    assert [vocabulary.words[token] for token in tokens] == PROSE.replace("\n", " <eos> ").split()
    assert vocabulary.decode(tokens) == PROSE
    assert vocabulary.encode("the  dog").tolist() == [vocabulary.words.index("the"), 0]
    assert vocabulary.decode([0, 2]) == f"<unk> {vocabulary.words[2]}"


@pytest.mark.parametrize("max_words", [3, 4, 7, 100])
def test_the_most_frequent_words_are_learned_in_a_fixed_order(max_words):
    text = "d d d c b b a e <unk> <unk> <eos>\n\n" * 3
    counts = Counter(text.split())
    del counts["<unk>"], counts["<eos>"]
    expected = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    vocabulary = WordVocabulary.learn(text, max_words)
    assert vocabulary.words == ["<unk>", "<eos>", *expected][:max_words]
    assert vocabulary.encode("<unk> <eos>").tolist() == [0, 1]


@given(st.text(alphabet="ab \n\t\x0b\x0c\x1c\u2028", max_size=40))
def test_word_tokens_do_not_depend_on_where_other_line_ends_stand(text):
    vocabulary = WordVocabulary(["<unk>", "<eos>", "a", "b", "ab"])
    # One line at a time must give what the text as a whole gives.
    whole = vocabulary._tokenizer.encode(text).ids
    assert vocabulary.encode(text).tolist() == whole


@pytest.mark.parametrize("level", ["char", "byte", "word"])
def test_a_vocabulary_survives_json(level):
    text = PROSE.encode() if level == "byte" else PROSE
    vocabulary = learn_vocabulary(level, text, 5)
    again = vocabulary_from_json(json.loads(json.dumps(vocabulary.to_json())))
    assert again == vocabulary
    assert type(again) is type(vocabulary)
    assert again.encode(PROSE).tolist() == vocabulary.encode(PROSE).tolist()


@pytest.mark.parametrize(
    "record",
    [
        {},
        [],
        {"level": "syllable"},
        {"level": "char"},
        {"level": "char", "characters": "aa"},
        {"level": "word", "words": ["a"]},
        {"level": "word", "words": ["<unk>", "<eos>", "a", "a"]},
    ],
)
def test_what_is_no_vocabulary_is_refused(record):
    with pytest.raises(ValueError, match="vocabulary"):
        vocabulary_from_json(record)


@pytest.mark.parametrize("token", [-1, 4])
def test_token_numbers_outside_the_vocabulary_are_refused(token):
    with pytest.raises(IndexError, match=f"token {token} is outside a vocabulary of 4"):
        CharVocabulary("abc").decode([1, token])


def test_a_text_begins_after_a_line_end_or_with_the_first_symbol():
    assert CharVocabulary("\nab").beginning() == [1]
    assert CharVocabulary("xyz").beginning() == [1]
    assert CharVocabulary("\tab\n"[::-1]).beginning() == [1]
    assert CharVocabulary("ab\n").beginning() == [3]
    assert ByteVocabulary().beginning() == [10]
    assert WordVocabulary(["<unk>", "<eos>", "a"]).beginning() == [1]


def test_several_files_are_read_one_after_the_other(tmp_path):
    (tmp_path / "one").write_bytes("\ufeffeins\r\n".encode())
    (tmp_path / "two").write_text("zwei")
    paths = [tmp_path / "two", tmp_path / "one"]
    assert read_text(paths, "char") == "zweieins\r\n"
    assert read_text(paths, "byte") == "zwei\ufeffeins\r\n".encode()


def test_bytes_that_are_no_text_are_read_at_the_byte_level_only(tmp_path):
    path = tmp_path / "latin"
    path.write_bytes(b"ol\xe9")
    assert read_text([path], "byte") == b"ol\xe9"
    with pytest.raises(CorpusError, match=r"latin is not UTF-8 text \(byte 2 is 0xe9\).*--level"):
        read_text([path], "char")


def test_files_that_can_not_be_read_are_refused(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match=r"cannot read data file .*none: No such file"):
        read_text([tmp_path / "none"], "char")
    with pytest.raises(CorpusError, match=r"cannot read data file .*: Is a directory"):
        read_text([tmp_path], "byte")
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(CorpusError, match="empty is empty"):
        read_text([empty], "char")

    # As root, who runs many a test, every file is readable.
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CorpusError, match=r"cannot read data file .*empty: Permission denied"):
        read_text([empty], "char")


@pytest.mark.parametrize("level", ["char", "byte"])
def test_the_splits_are_contiguous_and_cover_the_text(tmp_path, level):
    text = "".join(chr(97 + n * n % 26) for n in range(1000))
    path = tmp_path / "text"
    path.write_text(text)
    corpus = build_corpus([path], level)
    splits = [corpus.train, corpus.valid, corpus.test]
    assert [len(split.tokens) for split in splits] == [900, 50, 50]
    assert [split.characters for split in splits] == [900, 50, 50]
    assert "".join(corpus.vocabulary.decode(split.tokens.tolist()) for split in splits) == text


@pytest.mark.parametrize("end", ["\n", " "])
def test_a_word_text_is_cut_between_words(tmp_path, end):
    text = "".join(f"word{n} is here{end}" for n in range(100))
    path = tmp_path / "text"
    path.write_text(text)
    corpus = build_corpus([path], "word")
    splits = [corpus.train, corpus.valid, corpus.test]
    words = len(text.replace("\n", " <eos> ").split())
    assert sum(len(split.tokens) for split in splits) == words
    assert sum(split.characters for split in splits) == len(text)
    assert min(len(split.tokens) for split in splits) >= words // 25
    read = " ".join(corpus.vocabulary.decode(split.tokens.tolist()) for split in splits)
    assert "is here" in read
    # Half a word would be another unknown one; only those after the training split are unknown.
    unknown = sum((split.tokens == 0).sum().item() for split in splits)
    assert unknown == sum(f"word{n}" not in corpus.vocabulary.words for n in range(100))


def test_the_vocabulary_is_learned_from_the_training_split_alone(tmp_path):
    path = tmp_path / "text"
    path.write_text("ab" * 475 + "z" * 50)
    corpus = build_corpus([path], "char")
    assert corpus.vocabulary.characters == "ab"
    assert corpus.test.unknown_share(corpus.vocabulary) == 1.0
    assert corpus.valid.unknown_share(corpus.vocabulary) == 0.0


@pytest.mark.parametrize("level", ["char", "byte", "word"])
def test_a_text_too_short_to_split_is_refused(tmp_path, level):
    path = tmp_path / "short"
    path.write_text("hello\n")
    with pytest.raises(CorpusError, match=r"short is too short: its valid split has \d tokens"):
        build_corpus([path], level)


def test_the_fingerprint_tells_texts_apart(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("abc" * 100)
    two.write_text("abc" * 99 + "abd")
    fingerprints = {build_corpus([path], "byte").fingerprint for path in (one, two, one)}
    assert len(fingerprints) == 2


def test_the_default_text_is_the_standard_library():
    text = default_text("char")
    assert text == default_text("char")
    library = Path(sysconfig.get_path("stdlib"))
    assert (library / "textwrap.py").read_text(encoding="utf-8") in text
    assert len(text) > 1_000_000
    assert default_text("byte").decode("utf-8", "ignore") == text


def test_the_default_text_leaves_out_what_is_not_the_librarys_own(tmp_path, monkeypatch):
    for name in ("b.py", "a/c.py", "site-packages/d.py", "a/test/e.py", "f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert default_text("char") in ("b.pya/c.py", "a/c.pyb.py")


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CorpusError, match=r"no library sources .*give --data FILE"):
        default_text("char")
