import random
from dataclasses import replace

import pytest
import torch

from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.errors import CheckpointError
from sparse_ft.experts.inference import mean_states, row_logits, with_trunks
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.arrow import arrow_gate

WORDS = ["Ada", "met", "Charles", "in", "London", "and", "Lisbon", ",", "1996-08-22", "antidisestablishmentarianism"]


def random_rows(count, *, longest, seed=0):
    generator = random.Random(seed)
    return [generator.choices(WORDS, k=generator.randint(1, longest)) for _ in range(count)]


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def model(request, make_model):
    return make_model(request.param, {"names": ("word", 5), "mood": ("text", 3)}, first_block={"names": 0, "mood": 1})


def tag(model, rows, *, max_length=24):
    examples = Encoder(model.backbone, max_length=max_length).words(rows)
    return row_logits(model, "names", examples, num_rows=len(rows), num_parts=[len(row) for row in rows])


def classify(model, texts):
    examples = Encoder(model.backbone, max_length=64).texts(texts)
    return row_logits(model, "mood", examples, num_rows=len(texts))


def assert_same(got, expected):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 60])
def test_texts_answer_the_same_in_any_order_and_any_batch(model, monkeypatch, max_tokens):
    texts = [" ".join(words) for words in random_rows(20, longest=15)] + ["", "Ada"]
    expected = [classify(model, [text])[0] for text in texts]
    assert len({tuple(row.tolist()) for row in expected}) > 15
    monkeypatch.setattr("sparse_ft.backbone.batching.MAX_TOKENS", max_tokens)
    order = random.Random(1).sample(range(len(texts)), k=len(texts))
    got = classify(model, [texts[index] for index in order])
    assert_same(got, [expected[index] for index in order])
    assert all(row.shape == (3,) and row.dtype == torch.float32 and not row.requires_grad for row in got)


@pytest.mark.parametrize("max_tokens", [1, 60])
def test_words_answer_the_same_in_any_order_and_any_batch(model, monkeypatch, max_tokens):
    rows = [*random_rows(12, longest=40), [], ["Ada"]]
    expected = [tag(model, [row])[0] for row in rows]
    monkeypatch.setattr("sparse_ft.backbone.batching.MAX_TOKENS", max_tokens)
    order = random.Random(1).sample(range(len(rows)), k=len(rows))
    got = tag(model, [rows[index] for index in order])
    assert_same(got, [expected[index] for index in order])
    assert [tuple(row.shape) for row in got] == [(len(rows[index]), 5) for index in order]


def test_windows_are_stitched_word_by_word(model):
    rows = random_rows(6, longest=60, seed=2)
    encoder = Encoder(model.backbone, max_length=24)
    examples = encoder.words(rows)
    assert len(examples) > 2 * len(rows)
    got = tag(model, rows)
    seen = 0
    for example in examples:
        num_words = len(example.word_indices)
        if not num_words:
            continue
        alone = replace(example, row=0, word_indices=list(range(num_words)))
        [window] = row_logits(model, "names", [alone], num_rows=1, num_parts=[num_words])
        assert len(example.input_ids) <= 24
        torch.testing.assert_close(got[example.row][example.word_indices], window, atol=1e-5, rtol=1e-5)
        seen += num_words
    assert seen == sum(map(len, rows))


def test_a_word_that_the_tokenizer_drops_is_o_with_certainty_and_changes_no_other(make_model):
    model = make_model("bert", {"names": ("word", 5)})
    [plain] = tag(model, [["Ada", "met", "Charles"]])
    [logits] = tag(model, [["Ada", "\u200b", "met", "\x00", "Charles"]])
    torch.testing.assert_close(logits[[0, 2, 4]], plain)
    for dropped in (1, 3):
        probabilities = logits[dropped].softmax(-1)
        assert probabilities[0] == 1
        assert probabilities.isfinite().all()
    [nothing] = tag(model, [["\x00"]])
    assert nothing.argmax(-1).tolist() == [0]


def test_no_texts_at_all(model):
    assert classify(model, []) == []
    assert tag(model, []) == []
    [empty] = tag(model, [[]])
    assert empty.shape == (0, 5)


def test_mean_states_are_those_of_the_bare_backbone(model):
    texts = [" ".join(words) for words in random_rows(9, longest=15)] + ["Ada"]
    examples = Encoder(model.backbone, max_length=64).texts(texts)
    last = model.backbone.num_blocks - 1
    got = mean_states(model, examples, block=last)
    assert got.shape == (10, last + 1, model.backbone.hidden_size)
    for example, row in zip(examples, got, strict=True):
        kept = [with_trunks(model, [example], block=block)[0] for block in range(last + 1)]
        expected = torch.stack([alone.trunk.mean(0) for alone in kept])
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)
        assert all(alone.means is None for alone in kept)
    (bare,) = with_trunks(model, examples[:1], block=last, hidden=False, means=True)
    assert bare.trunk is None  # hidden states of many texts take memory
    assert torch.equal(bare.means, with_trunks(model, examples[:1], block=last, means=True)[0].means)


class Shortlist(torch.nn.Module):
    """Routes tokens like another gate, but names the experts of each row."""

    def __init__(self, gate):
        super().__init__()
        self.gate, self.names, self.blocks = gate, gate.names, gate.blocks

    def route(self, inputs):
        weights = self.gate.route(inputs).weights.flip(-1)
        order = torch.arange(weights.shape[-1]).flip(0)
        return Routing(order.expand(len(weights), -1), weights)


@pytest.mark.parametrize("wrap", [lambda gate: gate, Shortlist], ids=["all experts", "a shortlist"])
def test_usage_is_the_mean_over_the_tokens_of_each_text_in_each_block(model, wrap, monkeypatch):
    gate, texts = wrap(arrow_gate(model)), [" ".join(words) for words in random_rows(5, longest=12)]
    examples = Encoder(model.backbone, max_length=64).texts(texts)
    usage = torch.zeros(len(texts), model.backbone.num_blocks, 2)
    monkeypatch.setattr("sparse_ft.backbone.batching.MAX_TOKENS", 40)
    row_logits(model, "mood", examples, num_rows=len(texts), gate=gate, usage=usage)
    for example, mean in zip(examples, usage, strict=True):
        seen = {}
        with torch.no_grad():
            model(collate([("mood", example)], pad_id=model.backbone.pad_id), gate=gate, block_routings=seen)
        for block, routing in seen.items():
            torch.testing.assert_close(mean[block], routing.dense_weights(2)[0].mean(0), atol=1e-5, rtol=1e-5)
    assert usage.sum(-1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_task_and_expert(make_model, value):
    broken = make_model("bert", {"names": ("word", 5), "mood": ("text", 3)})
    broken.experts.replace(replace(broken.experts.get("mood"), alpha=value))
    broken.requires_grad_(False)
    assert len(tag(broken, [["Ada"]])) == 1
    with pytest.raises(CheckpointError, match=r"Task 'mood' has logits that are NaN.* the experts 'mood'\."):
        classify(broken, ["Ada"])
