"""An expert in two halves: nothing changes until they are trained, and then each learns from its own texts."""

import pytest
import torch
from toy_checkpoints import tensors
from toys import run, settings, write_toy

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import ConfigError
from sparse_ft.merging.edit import edit

TEXTS = ["the table loved", "a weather boring", "music at six", "the film and then football"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_bert):
    folder = tmp_path_factory.mktemp("whole")
    tasks = [write_toy(folder, name) for name in ("mood", "about")]
    return run(tasks, tiny_bert, folder / "checkpoint").path


@pytest.fixture(scope="module")
def halved(tmp_path_factory, whole):
    return edit(whole, split=[("mood", "mood-2")], output=tmp_path_factory.mktemp("halved") / "out")


def answers(path, task):
    return sparse_ft.load(path, device="cpu").logits(TEXTS, task)


def test_no_answer_changes(whole, halved):
    assert torch.equal(answers(halved.path, "about"), answers(whole, "about"))
    # Rows of one task now meet in the path for several experts, which rounds differently.
    torch.testing.assert_close(answers(halved.path, "mood"), answers(whole, "mood"))


def test_the_gate_chooses_among_the_halves_and_nothing_else(halved):
    loaded = load_checkpoint(halved.path)
    assert loaded.model.tasks["mood"].experts == ("mood", "mood-2")
    assert loaded.model.gate.names == ["mood", "about", "mood-2"]
    report = sparse_ft.evaluate(halved.path, tasks=["mood"], device="cpu").routing
    chosen = report.confusion["mood"]
    assert set(chosen) == {"mood", "mood-2"}
    assert sum(chosen.values()) == 32
    assert report.accuracy == 1.0
    assert report.entropy["mood"] >= 0


def test_a_prediction_names_the_half_that_the_gate_took(halved):
    model = sparse_ft.load(halved.path, device="cpu")
    for answer in model.predict(TEXTS, tasks=["mood", "about"]):
        chosen = set(answer.routing) - {"about"}
        assert chosen in ({"mood"}, {"mood-2"})
        assert set(answer.routing.values()) == {1.0}


def test_each_half_is_trained_further_on_its_own_texts(tmp_path, whole, halved):
    trained = sparse_ft.train(
        ["mood"], from_checkpoint=halved.path, output=tmp_path / "out", overrides=settings(), device="cpu"
    ).path
    before, after = tensors(halved.path), tensors(trained)
    changed = {
        name.split("/")[1]
        for name in before
        if name.startswith("experts/") and not torch.equal(before[name], after[name])
    }
    assert {"mood", "mood-2"} <= changed
    assert "about" not in changed
    first, second = (
        {name.rpartition(":")[2]: value for name, value in after.items() if name.startswith(f"experts/{half}/")}
        for half in ("mood", "mood-2")
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(answers(trained, "about"), answers(whole, "about"))
    assert sparse_ft.load(trained, device="cpu").predict(TEXTS)[0].tasks


def test_what_cannot_be_split_is_refused(tmp_path, halved):
    with pytest.raises(ConfigError, match=r"Unknown expert 'moody'\. Did you mean 'mood'\?"):
        edit(halved.path, split=[("moody", "x")], output=tmp_path / "out")
    with pytest.raises(ConfigError, match="There is an expert named 'about' already"):
        edit(halved.path, split=[("mood", "about")], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_tasks_can_be_split_until_their_halves_differ(tmp_path, whole, halved):
    both = edit(whole, split=[("mood", "mood-2"), ("about", "about-2")], output=tmp_path / "both")
    torch.testing.assert_close(answers(both.path, "mood"), answers(whole, "mood"))
    trained = sparse_ft.train(
        ["mood"], from_checkpoint=halved.path, output=tmp_path / "out", overrides=settings(), device="cpu"
    ).path
    with pytest.raises(ConfigError, match=r"Task 'mood' is split between mood and mood-2, which differ by now"):
        edit(trained, split=[("about", "about-2")], output=tmp_path / "again")
    edit(trained, split=[("mood-2", "mood-3")], output=tmp_path / "thrice")


def test_the_expert_of_another_task_goes_and_the_halves_answer_as_before(tmp_path, halved):
    changed = edit(halved.path, remove=["about"], output=tmp_path / "out")
    assert torch.equal(answers(changed.path, "mood"), answers(halved.path, "mood"))
    model = sparse_ft.load(changed.path, device="cpu")
    assert {name for answer in model.predict(TEXTS, ["mood"]) for name in answer.routing} <= {"mood", "mood-2"}
    with pytest.raises(ConfigError, match="The gate chooses among mood, about, mood-2, the model has mood, mood-2"):
        model.predict(TEXTS)


def test_scores_of_a_gate_are_not_those_of_experts_that_it_does_not_know(tmp_path, halved):
    copied = load_checkpoint(edit(halved.path, copy=[("about", "theme")], output=tmp_path / "out").path)
    assert "routing_accuracy" in copied.metrics["about"]
    assert copied.metrics["theme"] == {
        name: value for name, value in copied.metrics["about"].items() if name != "routing_accuracy"
    }


def test_another_task_does_not_change_which_half_answers(tmp_path, halved, caplog):
    new = write_toy(tmp_path, "mood", as_name="feeling")
    trained = sparse_ft.train(
        [new], from_checkpoint=halved.path, output=tmp_path / "out", overrides=settings(train__epochs=1), device="cpu"
    ).path
    assert "The gate stays as it is" in caplog.text
    assert torch.equal(answers(trained, "mood"), answers(halved.path, "mood"))
    assert load_checkpoint(trained).model.gate.names == ["mood", "about", "mood-2"]
    with pytest.raises(ConfigError, match="does not know the expert 'feeling', which came later"):
        sparse_ft.load(trained, device="cpu").predict(TEXTS)
    anew = sparse_ft.train([], from_checkpoint=trained, stage="gate", output=tmp_path / "anew", device="cpu").path
    assert set(load_checkpoint(anew).model.gate.names) == {"mood", "about", "mood-2", "feeling"}
