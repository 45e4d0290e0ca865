"""Runs that are interrupted and resumed, and what is refused. Runs that are killed: contracts/test_new_processes.py."""

import json
import os
import shutil

import pytest
import torch
from toy_checkpoints import assert_same_end, disk, interrupt, saved, tensors
from toys import run, settings, toy_rows, write_toy

import sparse_ft
from sparse_ft.checkpoint import locks
from sparse_ft.checkpoint.locks import lock_file
from sparse_ft.checkpoint.outputs import claimed_run
from sparse_ft.errors import CheckpointError, ConfigError, DataError
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.resume import find_resume


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_bert):
    """A run of one task, stopped after 5 steps of 6: the folder of its data and of its output; read-only."""
    folder = tmp_path_factory.mktemp("stopped")
    task = write_toy(folder / "data", "mood", sizes=(24, 8, 8))
    options = {"train__batch_size": 8, "train__save_steps": 1}
    interrupt(after=5, start=lambda: run([task], tiny_bert, folder / "out", seed=4, **options))
    return folder


@pytest.fixture
def interrupted(stopped, tmp_path):
    """The task file of that run, and a copy of its output."""
    return str(stopped / "data/mood.yaml"), shutil.copytree(stopped / "out", tmp_path / "out")


def test_a_resumed_run_ends_as_the_whole_one_also_if_settings_are_repeated(interrupted, tiny_bert, tmp_path):
    task, output = interrupted
    overrides = settings(train__batch_size=8, train__save_steps=1)
    again = {"backbone": str(tiny_bert), "overrides": overrides, "seed": 4, "resume": True}
    resumed = tensors(sparse_ft.train([task], output=output, **again).path)
    complete = tensors(run([task], tiny_bert, tmp_path / "complete", seed=4, train__batch_size=8).path)
    assert all(torch.equal(resumed[name], complete[name]) for name in complete)


def test_a_run_on_data_in_memory_is_resumed_with_the_same_task_and_data_only(tmp_path, tiny_bert):
    rows = toy_rows("mood", 40)
    spec = TaskSpec(name="mood", kind="classification", metric="accuracy")
    data = ([row["text"] for row in rows], [row["label"] for row in rows])
    options = {"backbone": str(tiny_bert), "device": "cpu", "overrides": settings(train__epochs=1)}
    complete = sparse_ft.train(spec, data=data, output=tmp_path / "complete", **options).path
    output, options["overrides"] = tmp_path / "out", settings(train__epochs=1, train__save_steps=1)
    interrupt(after=2, start=lambda: sparse_ft.train(spec, data=data, output=output, **options))
    with pytest.raises(ConfigError, match=r"'mood'.*Give its TaskSpec to train\(\) again"):
        sparse_ft.train(output=output, resume=True)
    with pytest.raises(DataError, match="Task 'mood' comes without data"):
        sparse_ft.train(spec, output=output, resume=True)
    with pytest.raises(CheckpointError, match="not those of the interrupted run"):
        sparse_ft.train(spec, data=(data[0][1:], data[1][1:]), output=output, resume=True)
    assert_same_end(sparse_ft.train(spec, data=data, output=output, resume=True).path, complete)


def test_tasks_of_a_checkpoint_may_be_repeated_when_resuming(tmp_path, make_model):
    old = saved(tmp_path / "old", make_model, "bert")
    again = {"output": tmp_path / "out", "from_checkpoint": old, "device": "cpu"}
    again["overrides"] = settings(train__save_steps=1, train__batch_size=2, train__epochs=1)
    interrupt(after=2, start=lambda: sparse_ft.train(["mood"], **again))
    assert list(sparse_ft.train(["mood"], resume=True, **again).tasks) == ["mood"]


# What is refused; the state stays as it was.


@pytest.mark.parametrize(("options", "named"), [
    ({"overrides": ["train.batch_size=9"]}, "train.batch_size"),
    ({"overrides": ["experts.rank=2", "data.max_length=64"]}, "experts.rank, data.max_length"),
    ({"seed": 5}, "seed"),
    ({"backbone": "minilm2"}, "backbone"),
    ({"tasks": ["ner"]}, "tasks"),
    # Settings that happen to be the defaults are settings, too.
    ({"overrides": ["train.batch_size=32"]}, "train.batch_size"),
    ({"seed": 13}, "seed"),
    ({"from_checkpoint": "elsewhere"}, "(start|from)"),
    ({"data": "elsewhere"}, "(sources|data)"),
])  # fmt: skip
def test_other_settings_are_refused_by_name(stopped, options, named):
    output = stopped / "out"
    before = disk(output)
    with pytest.raises(ConfigError, match=rf"has other settings: {named}"):
        sparse_ft.train(output=output, resume=True, **options)
    assert disk(output) == before


def cut(output):
    state = output / "resume/state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])


def progress(**changes):
    """Change the state; ``...`` removes an entry."""

    def change(output):
        file = output / "resume/progress.json"
        values = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


@pytest.mark.parametrize(("damage", "said"), [
    (cut, r"state\.safetensors' cannot be read"),
    (progress(group=...), r"\['group'\]"),
    (progress(pooling="mean"), "mean pooling"),
])  # fmt: skip
def test_a_state_that_is_damaged_or_of_another_version_is_refused(interrupted, damage, said):
    _, output = interrupted
    damage(output)
    with pytest.raises(CheckpointError, match=said):
        sparse_ft.train(output=output, resume=True)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_changed_rows_are_refused(stopped, split):
    file = stopped / f"data/mood/{split}.jsonl"
    content = file.read_text()
    file.write_text("".join([*content.splitlines(keepends=True)[1:], '{"text": "the table", "label": "bad"}\n']))
    try:
        with pytest.raises(CheckpointError, match="not those of the interrupted run in"):
            sparse_ft.train(output=stopped / "out", resume=True)
    finally:
        file.write_text(content)
    assert (stopped / "out/resume/progress.json").is_file()


@pytest.mark.parametrize("moved", [{}, {"out/resume": "out/.resume.old"}, {"out": ".out.old"}])
def test_an_unfinished_run_is_not_overwritten_wherever_it_stopped(interrupted, tmp_path, tiny_bert, moved):
    task, output = interrupted
    for name, target in moved.items():  # between two renames of a save
        (tmp_path / name).rename(tmp_path / target)
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        run([task], tiny_bert, output)


def test_a_second_run_into_a_folder_is_refused_while_the_first_one_runs(interrupted, tiny_bert, monkeypatch):
    task, output = interrupted
    monkeypatch.setattr(locks, "_PATIENCE", 0.0)
    before = disk(output)
    with claimed_run(output):
        with pytest.raises(ConfigError, match=rf"out' is being written by process {os.getpid()} on"):
            sparse_ft.train(output=output, resume=True)
        with pytest.raises(ConfigError, match="out' holds an unfinished run"):
            run([task], tiny_bert, output)
    assert disk(output) == before


def test_a_run_whose_folder_was_taken_overwrites_nothing(interrupted, tmp_path, monkeypatch):
    """Somebody removed its lock, and another run went on in the folder."""
    from sparse_ft.training import loop as fitting

    _, output = interrupted
    step = fitting._Loop.step

    def taken(self, pairs):
        step(self, pairs)
        lock_file(output).unlink()
        (output / "manifest.json").write_text("of the other run")

    monkeypatch.setattr(fitting._Loop, "step", taken)
    with pytest.raises(CheckpointError, match=r"out' was taken over by another process.*Nothing there is overwritten"):
        sparse_ft.train(output=output, resume=True)
    assert (output / "manifest.json").read_text() == "of the other run"


def test_without_a_state_there_is_nothing_to_resume(tmp_path, toys):
    for output, said in ((tmp_path / "nothing", "nothing'"), (toys, "a finished checkpoint")):
        with pytest.raises(ConfigError, match=said):
            sparse_ft.train(output=output, resume=True)
    assert not (tmp_path / "nothing").exists()


def test_the_state_holds_no_pickle_and_names_the_config(stopped):
    files = sorted(file.name for file in (stopped / "out/resume").iterdir())
    assert files == ["config.yaml", "progress.json", "state.safetensors"]
    saved = find_resume(stopped / "out")
    assert (saved.seed, saved.train.batch_size, saved.tasks) == (4, 8, [str(stopped / "data/mood.yaml")])
