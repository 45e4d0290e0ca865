"""The routing of one text: what is shown is what the forward pass used."""

import json
from dataclasses import replace

import pytest
import torch
from toys import KINDS

from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.evaluation.token_routing import route_tokens
from sparse_ft.experts.gates import TokenGate
from sparse_ft.experts.selection import Selection
from sparse_ft.prediction.arrow import arrow_gate
from sparse_ft.prediction.routes import BASELINES, Route

TEXT = "Ada Lovelace loved the table in London"
NAMES = list(KINDS)


@pytest.fixture
def toys(toys):
    """A checkpoint of four experts, loaded anew, so that a test may change it."""
    return load_checkpoint(toys)


def token_gate(model, *, top_k=2, shortlist=None):
    choice, size = Selection(top_k=top_k), model.backbone.hidden_size
    gate = TokenGate(model.experts.names, size, blocks=[0, 1, 2], selection=choice, shortlist=shortlist)
    for linear in gate.linears:
        torch.nn.init.normal_(linear.weight)
    return gate.eval()


def seen_by(checkpoint, text, gate):
    """Run the text through the task ``mood`` and return what the gate said, block to [S, E]."""
    model, seen = checkpoint.model, {}
    (example,) = Encoder(model.backbone, max_length=checkpoint.config.data.max_length).texts([text])
    with torch.no_grad():
        model(collate([("mood", example)], pad_id=model.backbone.pad_id), gate=gate, block_routings=seen)
    return {block: routing.dense_weights(len(model.experts.names))[0] for block, routing in seen.items()}


def test_arrow_is_shown_as_the_forward_pass_used_it(toys):
    routed = route_tokens(toys, TEXT, route="arrow")
    seen = seen_by(toys, TEXT, arrow_gate(toys.model))
    assert routed.by_token
    assert (routed.blocks, routed.experts) == ([0, 1, 2], NAMES)
    for block, weights in zip(routed.blocks, routed.weights, strict=True):
        torch.testing.assert_close(weights, seen[block])
    assert routed.weights.sum(-1) == pytest.approx(1.0, abs=1e-5)
    assert sum(routed.usage.values()) == pytest.approx(1.0, abs=1e-5)
    assert not routed.weights.requires_grad


def test_a_text_that_is_no_unicode_is_refused(toys):
    with pytest.raises(DataError, match="no Unicode"):
        route_tokens(toys, "caf\udce9", route="arrow")


@pytest.mark.parametrize("shortlist", [None, 3])
def test_a_token_gate_of_the_checkpoint_is_the_default(toys, shortlist):
    toys.model.gate = token_gate(toys.model, shortlist=shortlist)
    routed = route_tokens(toys, TEXT)
    assert (routed.route, routed.by_token, routed.probabilities) == ("gate", True, None)
    seen = seen_by(toys, TEXT, toys.model.gate)
    torch.testing.assert_close(routed.weights, torch.stack([seen[block] for block in routed.blocks]))
    assert ((routed.weights > 0).sum(-1) == 2).all()
    assert len(routed.weights.argmax(-1).unique()) > 1


def test_the_gate_of_a_text_decides_once(toys):
    routed = route_tokens(toys, TEXT)
    routing = Route("gate", toys.model).rows(Encoder(toys.model.backbone, max_length=256).texts([TEXT]))
    assert not routed.by_token
    assert routed.weights.shape == (3, len(routed.tokens), 4)
    assert (routed.weights == routing.dense_weights(4)).all()
    assert list(routed.probabilities.values()) == pytest.approx(routing.logits.softmax(-1)[0].tolist())


@pytest.mark.parametrize("route", [*BASELINES, *NAMES])
def test_routes_of_whole_texts_have_weights_that_sum_to_one(toys, route):
    routed = route_tokens(toys, TEXT, route=route)
    assert not routed.by_token
    assert routed.probabilities is None
    assert sum(routed.usage.values()) == pytest.approx(1.0)
    assert (routed.weights == routed.weights[0, 0]).all()
    if route in NAMES:
        assert routed.to_dict()["usage"] == {route: 1.0}


def test_rules_may_choose_nothing(toys, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {contains: [London], expert: names}\n")
    assert route_tokens(toys, TEXT, route=str(rules)).to_dict()["usage"] == {"names": 1.0}
    assert route_tokens(toys, "Mozart", route=str(rules)).to_dict()["usage"] == {}


def test_the_form_of_the_json(toys):
    by_token, whole = (route_tokens(toys, TEXT, route=route).to_dict() for route in ("arrow", "gate"))
    keys = ["checkpoint", "route", "text", "truncated", "by_token", "experts", "blocks", "usage", "tokens"]
    assert list(by_token) == keys
    assert list(whole) == [*keys[:-1], "probabilities", "familiarity", "tokens"]
    assert json.loads(json.dumps(by_token)) == by_token
    for token in by_token["tokens"]:
        assert list(token) == ["text", "start", "end", "blocks"]
        assert list(token["blocks"]) == ["0", "1", "2"]
        for weights in token["blocks"].values():
            assert len(weights) == 2  # arrow takes two experts a token
            assert sum(weights.values()) == pytest.approx(1.0, abs=1e-5)
    assert all(list(token) == ["text", "start", "end"] for token in whole["tokens"])


@pytest.mark.parametrize(
    "text", [TEXT, "The  Weather,\tboring!", "我们在上海", "a 😀 b", "e\u0301 \x00 \u200b", "", "  "]
)
def test_tokens_are_pieces_of_the_text_as_given(toys, text):
    del toys.tasks["reply"]  # reads pairs, which a tab divides
    tokens = route_tokens(toys, text, route="uniform").tokens
    assert [tokens[0].text, tokens[-1].text] == ["[CLS]", "[SEP]"]
    inner = tokens[1:-1]
    assert all(token.text == text[token.start : token.end] for token in inner)
    assert [token.start for token in inner] == sorted(token.start for token in inner)
    assert all(token.start == token.end for token in (tokens[0], tokens[-1]))


def test_a_tab_divides_a_pair_where_a_task_reads_pairs(toys):
    text = "the table\tAda loved"
    routed = route_tokens(toys, text, route="arrow")
    assert [token.text for token in routed.tokens].count("[SEP]") == 2
    inner = [token for token in routed.tokens if token.end > token.start]
    assert all(token.text == text[token.start : token.end] for token in inner)
    assert inner[-1].end == len(text)


def test_a_long_text_is_cut_and_said_to_be(toys):
    routed = route_tokens(toys, "the table " * 200, route="arrow")
    assert routed.truncated
    assert len(routed.tokens) == routed.weights.shape[1] == toys.model.backbone.max_length
    assert not route_tokens(toys, TEXT, route="arrow").truncated


@pytest.mark.parametrize("text", ["Ada in Lisbon", "", "上海"])
def test_a_causal_family(toys, make_model, text):
    model = make_model("gpt2", {"mood": ("text", 2), "names": ("word", 3)}, first_block=1)
    routed = route_tokens(replace(toys, model=model, tasks={}), text, route="arrow")
    assert routed.blocks == [1, 2]
    assert len(routed.tokens) == routed.weights.shape[1] > 0
    assert routed.weights.sum(-1) == pytest.approx(1.0, abs=1e-5)


def test_one_expert_has_nothing_to_choose_also_without_a_gate(toys, make_model):
    alone = replace(toys, model=make_model("bert", {"mood": ("text", 2)}), tasks={})
    for route in ("gate", "arrow", "uniform", "mood"):
        routed = route_tokens(alone, TEXT, route=route)
        assert not routed.choosable
        assert routed.usage == {"mood": 1.0}
    assert route_tokens(toys, TEXT, route="mood").choosable


@pytest.mark.parametrize(("route", "message"), [
    ("unifrom", r"Unknown route 'unifrom'\. Did you mean 'uniform'\?"),
    ("task", r"a text alone belongs to no task\. Name the expert itself, .* route: gate, arrow, .*names"),
    ("gate", r"has no gate to choose among its experts\. Fit one with `sparse-ft train --stage gate .*--route: arrow"),
])  # fmt: skip
def test_routes_that_cannot_be_shown(toys, route, message):
    toys.model.gate = None
    with pytest.raises(ConfigError, match=message):
        route_tokens(toys, TEXT, route=route)
