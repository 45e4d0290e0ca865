"""The expert that tasks share, added to a copy of the weights."""

from dataclasses import replace

import pytest
import torch
from toy_checkpoints import add_random_expert, all_logits, save_model

from sparse_ft.checkpoint.checkpoint import load_checkpoint

HEADS = {"mood": ("text", 2), "about": ("text", 2), "names": ("word", 5)}


@pytest.fixture(params=["bert", "gpt2"])
def model(request, make_model):
    """Tasks with 1, 2 and 3 blocks of three of their own, above and beside a shared expert in all blocks."""
    model = make_model(request.param, HEADS, first_block={"mood": 2, "about": 1, "names": 0})
    add_random_expert(model, "common", rank=5, alpha=3.0, seed=9)
    for name in HEADS:
        model.tasks[name] = replace(model.tasks[name], shared="common")
    return model


def folded(model):
    return [layer for layer in model.experts.layers.values() if layer.folded is not None]


def assert_close(before, after):
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-5)


def test_a_folded_expert_answers_as_before(model):
    before = all_logits(model, list(HEADS))
    model.experts.fold("common")
    assert len(folded(model)) == len(model.experts.layers)
    assert_close(before, all_logits(model, list(HEADS)))


def test_rows_without_it_read_the_frozen_weights(model):
    model.tasks["mood"] = replace(model.tasks["mood"], shared=None)
    before = all_logits(model, ["mood"])
    model.experts.fold("common")
    for name, logits in all_logits(model, ["mood"]).items():
        assert torch.equal(logits, before[name])
    mixed = all_logits(model, list(HEADS))
    torch.testing.assert_close(mixed["mood together"], before["mood alone"], rtol=0, atol=1e-5)


def test_it_follows_the_numbers_of_the_experts_and_ends_when_the_expert_may_change(model):
    model.experts.fold("common")
    model.remove_task("mood")
    model.experts.remove("mood")
    before = all_logits(model, ["about", "names"])
    assert {layer.folded for layer in folded(model)} == {model.experts.index("common")}
    model.experts.parameters("common")
    assert not folded(model)
    assert_close(before, all_logits(model, ["about", "names"]))


def test_a_checkpoint_is_loaded_with_it_and_in_bf16_without(model, tmp_path):
    model.remove_task("about")
    model.experts.remove("about")
    path = save_model(tmp_path, model)
    before = all_logits(model, ["mood", "names"])
    loaded = load_checkpoint(path).model
    assert folded(loaded)
    assert_close(before, all_logits(loaded, ["mood", "names"]))
    assert not folded(load_checkpoint(path, dtype=torch.bfloat16).model)
