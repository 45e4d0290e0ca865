"""An expert in two halves: nothing changes until they are trained, and then each learns from its own texts."""

import pytest
import torch
from toy_checkpoints import tensors
from toys import KINDS, settings, write_toy

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import ConfigError
from sparse_ft.merging.edit import edit

TEXTS = ["the table loved", "a weather boring", "music at six", "the film and then football"]
SHORT = {"overrides": settings(train__epochs=1, data__train_limit=32), "device": "cpu"}


@pytest.fixture(scope="module")
def halved(tmp_path_factory, toys):
    return edit(toys, split=[("mood", "mood-2")], output=tmp_path_factory.mktemp("halved") / "out").path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, halved):
    output = tmp_path_factory.mktemp("trained") / "out"
    return sparse_ft.train(["mood"], from_checkpoint=halved, output=output, **SHORT).path


def answers(path, task):
    return sparse_ft.load(path, device="cpu").logits(TEXTS, task)


def test_no_answer_changes(toys, halved):
    assert torch.equal(answers(halved, "about"), answers(toys, "about"))
    # Rows of one task now meet in the path for several experts, which rounds differently.
    torch.testing.assert_close(answers(halved, "mood"), answers(toys, "mood"))


def test_the_gate_chooses_among_the_halves_and_predictions_name_them(halved):
    loaded = load_checkpoint(halved)
    assert loaded.model.tasks["mood"].experts == ("mood", "mood-2")
    assert loaded.model.gate.names == [*KINDS, "mood-2"]
    report = sparse_ft.evaluate(halved, tasks=["mood"], device="cpu").routing
    assert set(report.confusion["mood"]) == {"mood", "mood-2"}
    assert sum(report.confusion["mood"].values()) == 32
    assert report.accuracy == 1.0
    for answer in sparse_ft.load(halved, device="cpu").predict(TEXTS, tasks=["mood", "about"]):
        assert set(answer.routing) - {"about"} in ({"mood"}, {"mood-2"})
        assert set(answer.routing.values()) == {1.0}


def test_each_half_is_trained_further_on_its_own_texts(halved, trained):
    before, after = tensors(halved), tensors(trained)
    experts = [name for name in before if name.startswith("experts/")]
    changed = {name.split("/")[1] for name in experts if not torch.equal(before[name], after[name])}
    assert changed == {"mood", "mood-2"}
    first, second = (
        {name.rpartition(":")[2]: value for name, value in after.items() if name.startswith(f"experts/{half}/")}
        for half in ("mood", "mood-2")
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(answers(trained, "about"), answers(halved, "about"))
    assert sparse_ft.load(trained, device="cpu").predict(TEXTS)[0].tasks


def test_two_tasks_can_be_split_until_their_halves_differ(tmp_path, toys, trained):
    both = edit(toys, split=[("mood", "mood-2"), ("about", "about-2")], output=tmp_path / "both").path
    torch.testing.assert_close(answers(both, "mood"), answers(toys, "mood"))
    with pytest.raises(ConfigError, match=r"Task 'mood' is split between mood and mood-2"):
        edit(trained, split=[("about", "about-2")], output=tmp_path / "again")
    edit(trained, split=[("mood-2", "mood-3")], output=tmp_path / "thrice")


def test_the_expert_of_another_task_goes_and_the_halves_answer_as_before(tmp_path, halved):
    changed = edit(halved, remove=["about"], output=tmp_path / "out").path
    assert torch.equal(answers(changed, "mood"), answers(halved, "mood"))
    model = sparse_ft.load(changed, device="cpu")
    assert {name for answer in model.predict(TEXTS, ["mood"]) for name in answer.routing} <= {"mood", "mood-2"}
    with pytest.raises(ConfigError, match="about"):  # the gate chooses among experts that are gone
        model.predict(TEXTS)


def test_scores_of_a_gate_are_not_those_of_experts_that_it_does_not_know(tmp_path, halved):
    metrics = load_checkpoint(edit(halved, copy=[("about", "theme")], output=tmp_path / "out").path).metrics
    assert "routing_accuracy" in metrics["about"]
    assert metrics["theme"] == {key: value for key, value in metrics["about"].items() if key != "routing_accuracy"}


def test_another_task_does_not_change_which_half_answers(tmp_path, halved, caplog):
    new = write_toy(tmp_path, "mood", sizes=(16, 8, 8), as_name="feeling")
    path = sparse_ft.train([new], from_checkpoint=halved, output=tmp_path / "out", **SHORT).path
    assert "The gate stays as it is" in caplog.text
    assert torch.equal(answers(path, "mood"), answers(halved, "mood"))
    assert load_checkpoint(path).model.gate.names == [*KINDS, "mood-2"]
    with pytest.raises(ConfigError, match="'feeling'"):
        sparse_ft.load(path, device="cpu").predict(TEXTS)
    anew = sparse_ft.train([], from_checkpoint=path, stage="gate", output=tmp_path / "anew", **SHORT).path
    assert set(load_checkpoint(anew).model.gate.names) == {*KINDS, "mood-2", "feeling"}
