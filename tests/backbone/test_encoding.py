"""Texts and words become windows of tokens. What each family promises: contracts/test_families.py."""

import random
from itertools import pairwise

import pytest
from tiny_backbones import POSITIONS

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Encoder


@pytest.fixture(scope="module")
def backbone_of(tiny_folder):
    """Return ``backbone_of(family)``, loaded once for this file."""
    loaded = {}

    def load(family, *, bos=None):
        if (family, bos) not in loaded:
            loaded[family, bos] = load_backbone(str(tiny_folder(family, bos=bos)))
        return loaded[family, bos]

    return load


def pieces_of(encoder, words):
    """All pieces of a row without special tokens, and the word of each, straight from the tokenizer."""
    encoded = encoder.tokenizer(list(words), is_split_into_words=True, add_special_tokens=False)
    return encoded["input_ids"], encoded.word_ids()


# Words and windows.


@pytest.mark.parametrize(("family", "bos"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_special_tokens_stand_around_words_as_around_texts(backbone_of, family, bos):
    encoder = Encoder(backbone_of(family, bos=bos), max_length=POSITIONS)
    assert len(encoder.prefix) + len(encoder.suffix) == int(bos)
    own = encoder.tokenizer("Ada met Charles", add_special_tokens=False)["input_ids"]
    assert encoder.texts(["Ada met Charles"])[0].input_ids == [*encoder.prefix, *own, *encoder.suffix]
    pieces, _ = pieces_of(encoder, ["Ada", "met"])
    assert encoder.words([["Ada", "met"]])[0].input_ids == [*encoder.prefix, *pieces, *encoder.suffix]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_window_that_owns_a_word_is_the_one_that_shows_most_around_it(backbone_of, family):
    backbone = backbone_of(family)
    probe = Encoder(backbone, max_length=POSITIONS)
    # Words of one piece, each used once: a token then tells where in the row a window stands.
    single = {}
    for token in sorted(backbone.tokenizer.get_vocab()):
        word = token.lstrip("Ġ▁")
        pieces, _ = pieces_of(probe, [word]) if word.isalpha() and word.isascii() and len(word) > 1 else ([], [])
        if len(pieces) == 1:
            single.setdefault(pieces[0], word)
    vocabulary = sorted(single.values())
    assert len(vocabulary) >= 60
    generator = random.Random(0)
    for _ in range(20):
        encoder = Encoder(backbone, max_length=generator.randint(8, 40))
        length = generator.randint(1, min(len(vocabulary), 150))
        words = generator.sample(vocabulary, k=length)
        pieces, word_of = pieces_of(encoder, words)
        assert word_of == list(range(length))
        capacity = encoder.max_length - len(encoder.prefix) - len(encoder.suffix)
        starts, owner = [], {}
        for number, example in enumerate(encoder.words([words])):
            inner = example.input_ids[len(encoder.prefix) : len(example.input_ids) - len(encoder.suffix)]
            start = pieces.index(inner[0])
            assert inner == pieces[start : start + capacity]
            starts.append(start)
            owner.update(dict.fromkeys(example.word_indices, number))
        assert starts[0] == 0
        assert starts[-1] == max(0, length - capacity)
        assert all(0 < right - left <= capacity - capacity // 4 for left, right in pairwise(starts))
        for word in range(length):
            shown = [
                min(word - start, start + capacity - 1 - word) if start <= word < start + capacity else -1
                for start in starts
            ]
            assert shown[owner[word]] == max(shown)


def test_a_row_that_just_fits_is_one_window_and_one_piece_more_makes_two(backbone_of):
    encoder = Encoder(backbone_of("bert"), max_length=20)
    assert [len(encoder.words([["in"] * length])) for length in (17, 18, 19)] == [1, 1, 2]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_word_longer_than_a_window_is_owned_once_and_so_are_its_neighbours(backbone_of, family):
    encoder = Encoder(backbone_of(family), max_length=16)
    longest = "ab" * 45
    pieces, _ = pieces_of(encoder, [longest])
    examples = encoder.words([["Ada", longest, "met", longest, "Charles"]])
    owned = [word for example in examples for word in example.word_indices]
    assert sorted(owned) == [0, 1, 2, 3, 4]
    if len(pieces) > 1:  # WordPiece makes one [UNK] of more than a hundred letters
        assert len(pieces) > 16
        assert len(examples) > 3


@pytest.mark.parametrize("dropped", ["\x00", "\u200b", "\u200e", "\x07\x08", "\ufffd"])
def test_a_word_that_the_tokenizer_drops_is_owned_by_none_and_shifts_no_other(backbone_of, dropped):
    encoder = Encoder(backbone_of("bert"), max_length=32)
    [with_it] = encoder.words([["Ada", dropped, "met", dropped, "Charles"]])
    [without] = encoder.words([["Ada", "met", "Charles"]])
    assert with_it.word_indices == [0, 2, 4]
    assert with_it.word_positions == without.word_positions
    assert with_it.input_ids == without.input_ids
    [nothing] = encoder.words([[dropped]])
    assert nothing.word_indices == nothing.word_positions == []
    assert nothing.input_ids == encoder.words([[]])[0].input_ids


# The real vocabulary.


@pytest.fixture(scope="module")
def minilm_encoder(minilm):
    return Encoder(load_backbone(minilm), max_length=64)


def test_minilm_loses_no_word_of_a_conll_sentence_of_124_words(minilm_encoder):
    # CoNLL-2003's longest sentences list results: names and numbers of many pieces each.
    generator = random.Random(1)
    words = ["SOCCER", "-", "JAPAN", "GET", "LUCKY", "WIN", ",", "6-4", "1996-12-06", "Wasyluk", "7:19.40", "Ntini"]
    rows = [generator.choices(words, k=124), generator.choices(words, k=124), words]
    examples = minilm_encoder.words(rows)
    for row, expected in enumerate(rows):
        owned = [word for example in examples if example.row == row for word in example.word_indices]
        assert sorted(owned) == list(range(len(expected)))
    assert sum(example.row == 0 for example in examples) > 3
    tokens = minilm_encoder.tokenizer.convert_ids_to_tokens
    for example in examples:
        for word, position in zip(example.word_indices, example.word_positions, strict=True):
            piece = tokens(example.input_ids[position])
            assert rows[example.row][word].lower().startswith(piece)


def test_stories260k_marks_the_last_piece_of_a_word(stories260k):
    encoder = Encoder(load_backbone(str(stories260k)), max_length=64)
    [example] = encoder.words([["Lily", "played", "outside"]])
    pieces, word_of = pieces_of(encoder, ["Lily", "played", "outside"])
    assert example.input_ids == [1, *pieces]
    last = [max(at for at, word in enumerate(word_of) if word == number) for number in range(3)]
    assert example.word_positions == [at + 1 for at in last]
