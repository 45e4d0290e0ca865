import random
from itertools import pairwise

import pytest
from tiny_backbones import CAUSAL, FAMILIES, POSITIONS

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Encoder

TEXT = "Ada Lovelace met Charles Babbage in London , did n't she ? Lisbon 1996-08-22"
WORDS = TEXT.split()
# Words of one piece up to words of a hundred, in several scripts.
MIXED = [*WORDS, "fox", "I", "上", "é", "antidisestablishmentarianism", "x" * 100, "…", "12,400", "😀", "ﬁ", "Ａ"]
SPECIALS = dict.fromkeys(("bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert"), 2)
SPECIALS |= {"gpt2": 0, "gpt_neox": 0, "llama": 1, "qwen2": 0}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_encoded_as_the_text_that_they_make(backbone_of, family):
    encoder = Encoder(backbone_of(family), max_length=POSITIONS)
    for text in ("The quick brown fox jumps", "Ada Lovelace met Charles Babbage in London", "a b c"):
        [as_text], [as_words] = encoder.texts([text]), encoder.words([text.split(" ")])
        assert as_words.input_ids == as_text.input_ids, encoder.tokenizer.decode(as_words.input_ids)


@pytest.mark.parametrize(
    ("family", "bos"), [*((family, None) for family in FAMILIES), ("llama", False), ("qwen2", True), ("gpt2", True)]
)
def test_special_tokens_stand_around_words_as_around_texts(backbone_of, family, bos):
    encoder = Encoder(backbone_of(family, bos=bos), max_length=POSITIONS)
    expected = SPECIALS[family] if bos is None else int(bos)
    assert len(encoder.prefix) + len(encoder.suffix) == expected
    own = encoder.tokenizer("Ada met Charles", add_special_tokens=False)["input_ids"]
    assert encoder.texts(["Ada met Charles"])[0].input_ids == [*encoder.prefix, *own, *encoder.suffix]
    pieces, _ = pieces_of(encoder, ["Ada", "met"])
    assert encoder.words([["Ada", "met"]])[0].input_ids == [*encoder.prefix, *pieces, *encoder.suffix]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_is_owned_once_and_marked_by_its_own_piece(backbone_of, family):
    backbone = backbone_of(family)
    generator = random.Random(family)
    for max_length in (8, 9, 13, 24, 50, POSITIONS):
        encoder = Encoder(backbone, max_length=max_length)
        rows = [generator.choices(MIXED, k=generator.randint(0, 90)) for _ in range(12)]
        examples = encoder.words(rows)
        assert [example.row for example in examples] == sorted(example.row for example in examples)
        assert {example.row for example in examples} == set(range(len(rows)))
        for row, words in enumerate(rows):
            pieces, word_of = pieces_of(encoder, words)
            found = {}
            for example in (example for example in examples if example.row == row):
                assert len(example.input_ids) <= max_length
                assert len(example.word_positions) == len(example.word_indices)
                for word, position in zip(example.word_indices, example.word_positions, strict=True):
                    assert word not in found
                    found[word] = example.input_ids[position]
            places = {word: [at for at, owner in enumerate(word_of) if owner == word] for word in set(word_of)}
            # The first piece has seen the whole word only if the model looks to the right.
            marked = {word: pieces[at[-1 if family in CAUSAL else 0]] for word, at in places.items()}
            assert found == marked
            assert set(found) == set(range(len(words))), [words[lost] for lost in set(range(len(words))) - set(found)]


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
    for _ in range(60):
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


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "roberta"])
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


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
@pytest.mark.parametrize("dropped", ["\x00", "\u200b", "\u200e", "\x07\x08", "\ufffd"])
def test_a_word_that_the_tokenizer_drops_is_owned_by_none_and_shifts_no_other(backbone_of, family, dropped):
    encoder = Encoder(backbone_of(family), max_length=32)
    [with_it] = encoder.words([["Ada", dropped, "met", dropped, "Charles"]])
    [without] = encoder.words([["Ada", "met", "Charles"]])
    assert with_it.word_indices == [0, 2, 4]
    assert with_it.word_positions == without.word_positions
    assert with_it.input_ids == without.input_ids
    [nothing] = encoder.words([[dropped]])
    assert nothing.word_indices == nothing.word_positions == []
    assert nothing.input_ids == encoder.words([[]])[0].input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_is_nothing_but_dropped_or_empty_words_still_has_a_token(backbone_of, family):
    encoder = Encoder(backbone_of(family), max_length=32)
    for words in ([], [""], ["\x00"], ["\u200b", ""]):
        examples = encoder.words([words])
        assert len(examples) == 1
        assert len(examples[0].input_ids) >= 1


# Texts and pairs.


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_texts_and_empty_lists(backbone_of, family):
    encoder = Encoder(backbone_of(family), max_length=32)
    assert encoder.texts([]) == encoder.words([]) == []
    first, second, third = encoder.texts(["", "Ada", ""])
    assert (first.row, second.row, third.row) == (0, 1, 2)
    assert len(first.input_ids) >= 1
    assert first.input_ids == third.input_ids == ([*encoder.prefix, *encoder.suffix] or [backbone_of(family).pad_id])
    [pair] = encoder.texts([""], [""])
    assert len(pair.input_ids) >= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_the_same_whatever_texts_stand_beside_it(backbone_of, family):
    encoder = Encoder(backbone_of(family), max_length=32)
    texts = ["Ada", TEXT, "", "fox " * 200]
    together = [example.input_ids for example in encoder.texts(texts)]
    assert together == [encoder.texts([text])[0].input_ids for text in texts]
    assert encoder.texts(texts)[1] == encoder.texts(texts)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_are_cut_on_the_right_and_pairs_from_the_longer(backbone_of, family):
    encoder = Encoder(backbone_of(family), max_length=24)
    [cut] = encoder.texts(["Ada met Charles " * 40])
    whole = Encoder(backbone_of(family), max_length=POSITIONS).texts(["Ada met Charles " * 3])[0].input_ids
    assert len(cut.input_ids) == 24
    begin = len(encoder.prefix) + 8
    assert cut.input_ids[:begin] == whole[:begin]
    assert cut.input_ids[24 - len(encoder.suffix) :] == encoder.suffix
    short = encoder.tokenizer(" fox", add_special_tokens=False)["input_ids"]
    [pair] = encoder.texts(["London Lisbon " * 40], ["fox"])
    assert len(pair.input_ids) == 24
    tail = pair.input_ids[: len(pair.input_ids) - len(encoder.suffix)]
    assert tail[-1] == short[-1]
    [pair] = encoder.texts(["fox"], ["London Lisbon " * 40])
    assert short[-1] in pair.input_ids[:5]


@pytest.mark.parametrize("family", FAMILIES)
def test_token_types_tell_the_second_text_where_the_family_has_them(backbone_of, family):
    encoder = Encoder(backbone_of(family), max_length=48)
    [pair] = encoder.texts(["Ada met Charles"], ["The fox jumps"])
    assert encoder.texts(["Ada met Charles"])[0].token_type_ids is None
    if family not in ("bert", "electra"):  # the others have no embeddings for them
        assert pair.token_type_ids is None
        return
    first = encoder.texts(["Ada met Charles"])[0].input_ids  # [CLS] a [SEP]
    assert pair.input_ids[: len(first)] == first
    assert pair.token_type_ids == [0] * len(first) + [1] * (len(pair.input_ids) - len(first))


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


def test_minilm_loses_no_word_of_a_text_of_ten_thousand_characters(minilm_encoder):
    generator = random.Random(2)
    letters = "abcdefghijklmnopqrstuvwxyzéß上海дם-'0123456789"
    words, size = [], 0
    while size < 10_000:
        words.append("".join(generator.choices(letters, k=generator.choice([1, 2, 5, 9, 30, 150]))))
        size += len(words[-1]) + 1
    owned = [word for example in minilm_encoder.words([words]) for word in example.word_indices]
    assert sorted(owned) == list(range(len(words)))


def test_stories260k_marks_the_last_piece_of_a_word(stories260k):
    encoder = Encoder(load_backbone(str(stories260k)), max_length=64)
    [example] = encoder.words([["Lily", "played", "outside"]])
    pieces, word_of = pieces_of(encoder, ["Lily", "played", "outside"])
    assert example.input_ids == [1, *pieces]
    last = [max(at for at, word in enumerate(word_of) if word == number) for number in range(3)]
    assert example.word_positions == [at + 1 for at in last]
