"""What every backbone family promises: how it loads, how it reads texts, and that a row's company changes nothing."""

import random

import pytest
import torch
from tiny_backbones import BLOCKS, CAUSAL, FAMILIES, HIDDEN, POSITIONS
from torch import nn
from toy_checkpoints import add_random_expert, all_logits, assert_bit_identical, trainable_of
from toy_models import (
    FIRST_BLOCK,
    SENTENCES,
    THREE_HEADS,
    assert_same_logits,
    one_by_one,
    rows_of,
    run_rows,
    three_tasks,
)

from sparse_ft.backbone.backbone import load_backbone, set_attention
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.experts.inference import with_trunks

# Last parts of the names of a block's linears and how many there are, from the papers and transformers' sources.
BLOCK_LINEARS = {
    "bert": {"query": 1, "key": 1, "value": 1, "dense": 3},
    "roberta": {"query": 1, "key": 1, "value": 1, "dense": 3},
    "electra": {"query": 1, "key": 1, "value": 1, "dense": 3},
    "deberta-v2": {"query_proj": 1, "key_proj": 1, "value_proj": 1, "dense": 3},
    "distilbert": {"q_lin": 1, "k_lin": 1, "v_lin": 1, "out_lin": 1, "lin1": 1, "lin2": 1},
    "modernbert": {"Wqkv": 1, "Wo": 2, "Wi": 1},
    "gpt2": {"c_attn": 1, "c_proj": 2, "c_fc": 1},
    "gpt_neox": {"query_key_value": 1, "dense": 1, "dense_h_to_4h": 1, "dense_4h_to_h": 1},
    "llama": dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 1),
    "qwen2": dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 1),
}
NUM_SPECIALS = {**dict.fromkeys(FAMILIES, 2), "gpt2": 0, "gpt_neox": 0, "llama": 1, "qwen2": 0}
# Words of one piece up to words of a hundred, in several scripts.
WORDS = [
    "Ada",
    "Lovelace",
    "met",
    ",",
    "did",
    "n't",
    "she",
    "?",
    "1996-08-22",
    "fox",
    "I",
    "上",
    "é",
    "antidisestablishmentarianism",
    "…",
    "12,400",
    "😀",
    "ﬁ",
    "Ａ",
]
WORDS += ["x" * 100]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(family, tiny_folder):
    return load_backbone(str(tiny_folder(family)))


@pytest.fixture(scope="module")
def model(family, make_model):
    """Three tasks with experts of different rank and depth; read-only."""
    return three_tasks(make_model, family)


@torch.no_grad()
def hidden_of(backbone, input_ids, mask=None):
    mask = torch.ones_like(input_ids) if mask is None else mask
    return backbone.model(input_ids=input_ids, attention_mask=mask).last_hidden_state


# Loading


def test_it_loads_frozen_with_all_linears_of_its_blocks_and_no_other(backbone, family):
    assert (backbone.hidden_size, backbone.num_blocks, backbone.max_length) == (HIDDEN, BLOCKS, POSITIONS)
    assert backbone.family.causal == (family in CAUSAL)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    counts = {}
    for name, module in backbone.linears.items():
        assert backbone.model.get_submodule(name) is module
        key = (backbone.block_of(name), name.rpartition(".")[2])
        counts[key] = counts.get(key, 0) + 1
    assert counts == {(block, end): count for block in range(BLOCKS) for end, count in BLOCK_LINEARS[family].items()}
    assert (family == "gpt2") == any(not isinstance(module, nn.Linear) for module in backbone.linears.values())


def test_padding_changes_nothing_and_only_causal_families_are_blind_to_the_right(backbone, family):
    ids = torch.tensor([Encoder(backbone, max_length=64).texts(["Ada met Charles in London"])[0].input_ids])
    length, plain = ids.shape[1], hidden_of(backbone, ids)
    padded = nn.functional.pad(ids, (0, 20), value=backbone.pad_id)
    mask = (torch.arange(length + 20) < length).long()[None]
    torch.testing.assert_close(hidden_of(backbone, padded, mask)[:, :length], plain, atol=1e-5, rtol=1e-5)
    changed = ids.clone()
    changed[0, -2] = ids[0, 1] if ids[0, 1] != ids[0, -2] else ids[0, 2]
    assert ((plain - hidden_of(backbone, changed))[0, :-2].abs().max() < 1e-6) == (family in CAUSAL)


def test_eager_attention_computes_what_the_default_does(tiny_folder, family):
    backbone = load_backbone(str(tiny_folder(family)))
    ids = torch.tensor([Encoder(backbone, max_length=64).texts(["Ada met Charles"])[0].input_ids]).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    before = hidden_of(backbone, ids, mask)
    set_attention(backbone, "eager")
    assert backbone.config._attn_implementation == "eager"
    after = hidden_of(backbone, ids, mask)
    torch.testing.assert_close(after[mask.bool()], before[mask.bool()], atol=1e-5, rtol=1e-4)


def test_a_row_of_max_length_fits(backbone):
    (example,) = Encoder(backbone, max_length=10_000).texts(["fox " * 500])
    assert len(example.input_ids) == backbone.max_length
    assert hidden_of(backbone, torch.tensor([example.input_ids])).isfinite().all()


# Reading


def test_words_are_encoded_as_the_text_that_they_make(backbone, family):
    encoder = Encoder(backbone, max_length=POSITIONS)
    for text in ("The quick brown fox jumps", "Ada Lovelace met Charles Babbage in London", "a b c"):
        [as_text], [as_words] = encoder.texts([text]), encoder.words([text.split(" ")])
        assert as_words.input_ids == as_text.input_ids, encoder.tokenizer.decode(as_words.input_ids)
    pieces = encoder.tokenizer("Ada met Charles", add_special_tokens=False)["input_ids"]
    assert encoder.texts(["Ada met Charles"])[0].input_ids == [*encoder.prefix, *pieces, *encoder.suffix]
    assert len(encoder.prefix) + len(encoder.suffix) == NUM_SPECIALS[family]


def test_every_word_is_owned_once_and_marked_by_its_own_piece(backbone, family):
    generator = random.Random(family)
    for max_length in (8, 13, 24, POSITIONS):
        encoder = Encoder(backbone, max_length=max_length)
        rows = [generator.choices(WORDS, k=generator.randint(0, 90)) for _ in range(6)]
        examples = encoder.words(rows)
        assert sorted({example.row for example in examples}) == list(range(len(rows)))
        assert max(len(example.input_ids) for example in examples) <= max_length
        for row, words in enumerate(rows):
            encoded = encoder.tokenizer(words, is_split_into_words=True, add_special_tokens=False)
            pieces, owners = encoded["input_ids"], encoded.word_ids()
            marked = [
                (word, example.input_ids[position])
                for example in examples
                if example.row == row
                for word, position in zip(example.word_indices, example.word_positions, strict=True)
            ]
            # The first piece has seen the whole word only if the model looks to the right.
            order = range(len(owners)) if family in CAUSAL else reversed(range(len(owners)))
            assert sorted(marked) == sorted({owners[index]: pieces[index] for index in order}.items())
            assert len(marked) == len(words)


def test_rows_of_nothing_still_have_a_token(backbone):
    encoder = Encoder(backbone, max_length=32)
    assert encoder.texts([]) == encoder.words([]) == []
    for words in ([], [""], ["\x00"], ["\u200b", ""]):
        (example,) = encoder.words([words])
        assert example.input_ids
    first, second, third = encoder.texts(["", "Ada", ""])
    assert (first.row, second.row, third.row) == (0, 1, 2)
    assert first.input_ids == third.input_ids == ([*encoder.prefix, *encoder.suffix] or [backbone.pad_id])
    assert encoder.texts([""], [""])[0].input_ids


def test_a_text_is_the_same_whatever_texts_stand_beside_it(backbone):
    encoder = Encoder(backbone, max_length=32)
    texts = ["Ada", " ".join(WORDS), "", "fox " * 200]
    assert [example.input_ids for example in encoder.texts(texts)] == [
        encoder.texts([text])[0].input_ids for text in texts
    ]


def test_long_texts_are_cut_on_the_right_and_pairs_from_the_longer(backbone, family):
    encoder = Encoder(backbone, max_length=24)
    [cut] = encoder.texts(["Ada met Charles " * 40])
    whole = Encoder(backbone, max_length=POSITIONS).texts(["Ada met Charles " * 3])[0].input_ids
    begin = len(encoder.prefix) + 8
    assert len(cut.input_ids) == 24
    assert cut.input_ids[:begin] == whole[:begin]
    assert cut.input_ids[24 - len(encoder.suffix) :] == encoder.suffix
    short = encoder.tokenizer(" fox", add_special_tokens=False)["input_ids"]
    [pair] = encoder.texts(["London Lisbon " * 40], ["fox"])
    assert len(pair.input_ids) == 24
    assert pair.input_ids[: 24 - len(encoder.suffix)][-1] == short[-1]
    [pair] = encoder.texts(["fox"], ["London Lisbon " * 40])
    assert short[-1] in pair.input_ids[:5]
    has_types = family in ("bert", "electra")  # the others have no embeddings for token types
    assert (pair.token_type_ids is not None) == has_types
    assert cut.token_type_ids is None
    if has_types:
        first = encoder.texts(["fox"])[0].input_ids  # [CLS] fox [SEP]
        assert pair.input_ids[: len(first)] == first
        assert pair.token_type_ids == [0] * len(first) + [1] * (24 - len(first))


# Answering


def test_a_batch_of_several_tasks_gives_the_logits_of_each_row_alone(model):
    alone = {task: one_by_one(model, task) for task in THREE_HEADS}
    with torch.no_grad():
        together = run_rows(model, [row for task in ("topic", "names", "mood") for row in rows_of(model, task)])
    assert list(together) == ["topic", "names", "mood"]
    for task, logits in alone.items():
        assert_same_logits(together[task], logits)
        assert logits.std(0).min() > 1e-3  # the texts do differ
    num_words = sum(len(text.split()) for text in SENTENCES)
    assert [tuple(logits.shape) for logits in alone.values()] == [(4, 3), (num_words, 7), (4, 12)]


def test_auto_pooling_is_the_last_token_for_causal_backbones_else_the_scaled_mean(model, make_model, family):
    expected = "last" if family in CAUSAL else "unit"
    assert model.pooling == expected
    chosen, first = (three_tasks(make_model, family, pooling=pooling) for pooling in (expected, "first"))
    with torch.no_grad():
        automatic = run_rows(model, rows_of(model, "mood"))["mood"]
        assert torch.equal(automatic, run_rows(chosen, rows_of(chosen, "mood"))["mood"])
        assert not torch.allclose(automatic, run_rows(first, rows_of(first, "mood"))["mood"], atol=1e-3)


def test_gradient_flows_into_expert_and_head_only_and_reaches_all_of_both(model):
    for task in THREE_HEADS:
        model.zero_grad()
        run_rows(model, rows_of(model, task))[task].square().sum().backward()
        trainable = trainable_of(model, task)
        num_linears = len(model.backbone.select_linears(first_block=FIRST_BLOCK[task]))
        assert len(trainable) == 2 + 2 * num_linears
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in trainable.values())
        own = {id(parameter) for parameter in trainable.values()}
        assert all(id(parameter) in own for parameter in model.parameters() if parameter.grad is not None)
    model.zero_grad()


def test_rows_with_a_cached_trunk_answer_and_learn_as_without(make_model, family):
    model = make_model(family, {"names": ("word", 5), "mood": ("text", 3)}, first_block=2)
    if not model.backbone.family.caches_trunk:
        pytest.skip(f"{family} caches none")
    rows = [*rows_of(model, "names"), *rows_of(model, "mood")]
    examples = with_trunks(model, [example for _, example in rows])
    cached = [(task, example) for (task, _), example in zip(rows, examples, strict=True)]
    results = []
    for batch in (rows, cached):
        model.zero_grad(set_to_none=True)
        logits = run_rows(model, batch)
        sum(own.square().mean() for own in logits.values()).backward()
        results.append([*logits.values(), *(v.grad for task in logits for v in trainable_of(model, task).values())])
    for plain, from_cache in zip(*results, strict=True):
        torch.testing.assert_close(from_cache, plain, atol=1e-5, rtol=1e-4)
    partly = run_rows(model, [*cached[:-1], rows[-1]])  # one row without a cache: all are computed
    torch.testing.assert_close(partly["mood"], results[0][1], atol=1e-5, rtol=1e-4)


def test_adding_and_removing_an_expert_leaves_the_others_bit_identical(make_model, family):
    model = three_tasks(make_model, family)
    before = all_logits(model, ["mood", "names"])
    add_random_expert(model, "fourth", first_block=0, rank=2, seed=5)
    model.add_task("fourth", expert="fourth", level="text", num_outputs=7)
    assert_bit_identical(before, all_logits(model, ["mood", "names"]))
    remaining = all_logits(model, ["names", "fourth"])
    model.experts.remove("topic")
    model.experts.remove("mood")  # those behind it move up
    assert_bit_identical(remaining, all_logits(model, ["names", "fourth"]))
