"""Exports of tasks that one expert serves below another."""

from dataclasses import replace

import pytest
import torch
from toy_checkpoints import add_random_expert, save_model

import sparse_ft
from sparse_ft.errors import ExportError
from sparse_ft.experts.named_experts import Expert, sum_of_experts
from sparse_ft.experts.routing import Routing

HEADS = {"mood": ("text", 2), "names": ("word", 5)}


@pytest.fixture
def shared_model(make_model):
    """Two tasks with an own expert in the last block each, and one expert of both below and beside."""
    model = make_model("bert", HEADS, first_block=2)
    add_random_expert(model, "common", rank=3, alpha=5.0, seed=3)
    for name in HEADS:
        model.tasks[name] = replace(model.tasks[name], shared="common")
    return model


def test_the_sum_of_experts_is_what_they_change_together(shared_model):
    model = shared_model
    together = sum_of_experts("both", [model.experts.get("mood"), model.experts.get("common")])
    assert set(together.ranks.values()) == {3, 7}
    model.experts.add(together)
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    states = []
    for names in (["mood", "common"], ["both"]):
        indices = torch.tensor([[model.experts.index(name) for name in names]])
        with torch.no_grad(), model.slot.filled(Routing(indices, torch.ones(indices.shape))):
            states.append(model.encoder(**inputs).last_hidden_state)
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format_", ["peft", "transformers"])
@pytest.mark.parametrize("task", HEADS)
def test_a_task_is_exported_with_both(shared_model, tmp_path, format_, task):
    path = save_model(tmp_path, shared_model)
    export = sparse_ft.export(path, format=format_, task=task, output=tmp_path / "out")
    assert export.differences[task].largest < 1e-3


def test_a_tagger_with_shapes_is_exported_and_a_task_on_texts_read_by_words_is_refused(shared_model, tmp_path):
    common = shared_model.experts.get("common")
    shared_model.experts.replace(Expert("common", common.alpha, common.deltas, torch.randn(9, 32)))
    shared_model.by_words = True
    path = save_model(tmp_path, shared_model)
    export = sparse_ft.export(path, format="transformers", task="names", output=tmp_path / "tagger")
    assert export.differences["names"].largest < 1e-3
    with pytest.raises(ExportError, match="split into words, because it shares an expert"):
        sparse_ft.export(path, format="transformers", task="mood", output=tmp_path / "texts")


def test_a_renamed_shared_expert_is_still_shared(shared_model, tmp_path):
    path = save_model(tmp_path, shared_model)
    sparse_ft.edit(path, rename=[("common", "trunk")], output=tmp_path / "renamed")
    before, after = (sparse_ft.load(each, device="cpu") for each in (path, tmp_path / "renamed"))
    assert after.checkpoint.model.trunk_expert == "trunk"
    assert torch.equal(before.logits(["Ada met Mozart"], "mood"), after.logits(["Ada met Mozart"], "mood"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta-v2"])
def test_tasks_of_one_expert_are_one_dense_model(make_model, tmp_path, family):
    model = make_model(family, {}, pooling="unit")
    add_random_expert(model, "common", rank=3, alpha=5.0, seed=3)
    common = model.experts.get("common")
    model.experts.replace(Expert("common", common.alpha, common.deltas, torch.randn(9, 32)))
    for name, (level, outputs) in HEADS.items():
        model.add_task(name, expert="common", level=level, num_outputs=outputs).initialise(seed=1, name=name)
    model.by_words = True
    export = sparse_ft.export(save_model(tmp_path, model), format="multitask", output=tmp_path / "out")
    assert set(export.differences) == set(HEADS)
    assert max(difference.largest for difference in export.differences.values()) < 1e-3
    assert "answers all tasks" in (tmp_path / "out" / "README.md").read_text()


def test_tasks_of_different_experts_are_no_dense_model(shared_model, tmp_path):
    with pytest.raises(ExportError, match="are answered by different experts"):
        sparse_ft.export(save_model(tmp_path, shared_model), format="multitask", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
