"""Runs that are killed, in processes of their own, and end where the uninterrupted run ends."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from toy_checkpoints import assert_same_end, tensors
from toys import OPTIONS, POOL, run, settings, train_joint, write_rows, write_toy

import sparse_ft
from sparse_ft.checkpoint import folders
from sparse_ft.checkpoint.folders import recover_folder, replace_folder
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.training.resume import find_resume


class Killing:
    """What is put in the place of a function: it kills this process, as `kill -9` would, at its n-th call."""

    def __init__(self, function, number: int, *, when: str = "after") -> None:
        self.function, self.number, self.when = function, number, when

    def __call__(self, *args, **kwargs):
        self.number -= 1
        if self.number == 0 and self.when == "before":
            die()
        if self.number == 0 and self.when == "halfway":  # of write_bytes
            path, content = args
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[: len(content) // 2])
            die()
        result = self.function(*args, **kwargs)
        if self.number == 0:
            die()
        return result


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(tasks: list[str], backbone: str, output: Path, moment: str, number: int, joint: dict) -> None:
    """Train in this process, and kill it when the moment has come."""
    from sparse_ft.checkpoint import checkpoint
    from sparse_ft.training import loop as fitting
    from sparse_ft.training import resume
    from sparse_ft.training import train as training

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    if moment == "after step":
        count = Killing(fitting._Loop.step, number)
        fitting._Loop.step = lambda loop, pairs: count(loop, pairs)
    elif moment == "after epoch":
        count = Killing(fitting._Loop.end_epoch, number)
        fitting._Loop.end_epoch = lambda loop: count(loop)
    elif moment == "in save":
        resume.write_bytes = Killing(resume.write_bytes, number, when="halfway")
    elif moment == "in final save":
        checkpoint.write_bytes = Killing(checkpoint.write_bytes, number, when="halfway")
    elif moment == "before final save":
        training.save_checkpoint = Killing(training.save_checkpoint, number, when="before")
    elif moment == "between renames":  # two renames a save, of the old folder away and of the new one in
        renames = Killing(Path.rename, 2 * number - 2)
        Path.rename = lambda path, target: renames(path, target)
    else:  # the old folder of the run is moved away last of all
        rename = Path.rename
        Path.rename = lambda path, target: (rename(path, target), die() if path == output else None)
    stage = "joint" if joint else None
    overrides = settings(**OPTIONS, **joint)
    sparse_ft.train(tasks, backbone=backbone, output=output, overrides=overrides, device="cpu", stage=stage)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_bert):
    """Task files, and the files of the run that nobody killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    tasks = [write_toy(folder, name, sizes=(size, 8, 8)) for name, size in (("mood", 36), ("names", 20))]
    return tasks, run(tasks, tiny_bert, folder / "out", **OPTIONS).path


def killed_run(
    tasks: list[str], backbone: Path, output: Path, moment: str, number: int = 1, joint: dict | None = None
) -> None:
    """Run ``train_and_die`` in a new process; a server forks it, so that it need not import everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparse_ft.training.train", "sklearn.metrics", "peft", "transformers.models.bert"])
    process = context.Process(target=train_and_die, args=(tasks, str(backbone), output, moment, number, joint or {}))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL


MOMENTS = [
    ("after step", 5),  # one step after a save
    ("after step", 17),  # in the first epoch of the second task
    ("after step", 24),  # the last
    ("in save", 3),  # two files go through write_bytes a save: the tensors of the second one
    ("in save", 6),  # the config of the third one
    ("after epoch", 1),
    ("after epoch", 3),  # the last of the first task
    ("between renames", 3),
    ("before final save", 1),
    ("in final save", 3),
    ("between final renames", 1),
]


@pytest.mark.parametrize(("moment", "number"), MOMENTS, ids=[f"{moment} {number}" for moment, number in MOMENTS])
def test_a_killed_run_ends_where_the_uninterrupted_one_ends(tmp_path, tiny_bert, uninterrupted, moment, number):
    tasks, expected = uninterrupted
    output = tmp_path / "out"
    killed_run(tasks, tiny_bert, output, moment, number)
    assert not (output / "manifest.json").exists()
    result = sparse_ft.train(output=output, resume=True)
    assert_same_end(result.path, expected)
    assert len(result.history) == 6


def test_a_run_killed_twice_ends_there_too(tmp_path, tiny_bert, uninterrupted, monkeypatch):
    tasks, expected = uninterrupted
    output = tmp_path / "out"
    killed_run(tasks, tiny_bert, output, "after step", 3)
    interrupt(monkeypatch, after=10, start=lambda: sparse_ft.train(output=output, resume=True))
    assert_same_end(sparse_ft.train(output=output, resume=True).path, expected)


@pytest.mark.parametrize(("gate", "moment", "number"), [("token", "after step", 5), ("sequence", "in save", 6)])
def test_a_killed_joint_run_ends_where_the_uninterrupted_one_ends(
    tmp_path, tiny_bert, uninterrupted, gate, moment, number
):
    tasks, joint = uninterrupted[0], {"gate__type": gate, "gate__jitter": 0.1, "train__workers": 1, **POOL}
    expected = train_joint(tasks, tiny_bert, tmp_path / "expected", **OPTIONS, **joint)
    output = tmp_path / "out"
    killed_run(tasks, tiny_bert, output, moment, number, joint)
    assert not (output / "manifest.json").exists()
    with pytest.raises(ConfigError, match=r"has other settings: stage\. --resume continues it unchanged"):
        sparse_ft.train(output=output, resume=True, stage="experts")
    result = sparse_ft.train(output=output, resume=True)
    assert_same_end(result.path, expected.path)
    assert result.history == expected.history  # the gate's losses and the use of the experts, too


class Interrupted(BaseException):
    pass


def interrupt(monkeypatch, *, after: int, start) -> None:
    """Stop a run of this process after some steps."""
    from sparse_ft.training import loop as fitting

    step, count = fitting._Loop.step, 0

    def stopping(self, pairs):
        nonlocal count
        step(self, pairs)
        count += 1
        if count == after:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(fitting._Loop, "step", stopping)
        with pytest.raises(Interrupted):
            start()


@pytest.fixture
def interrupted(tmp_path, tiny_bert, monkeypatch):
    """A run of one task, stopped after 5 steps of 6: its task file and its folder."""
    task = write_toy(tmp_path / "data", "mood", sizes=(24, 8, 8))
    options = {"train__batch_size": 8, "train__save_steps": 1}
    interrupt(monkeypatch, after=5, start=lambda: run([task], tiny_bert, tmp_path / "out", seed=4, **options))
    return task, tmp_path / "out"


def test_settings_may_be_repeated_when_resuming(interrupted, tiny_bert):
    task, output = interrupted
    overrides = settings(train__batch_size=8, train__save_steps=1)
    path = sparse_ft.train(
        [task], backbone=str(tiny_bert), output=output, overrides=overrides, seed=4, resume=True
    ).path
    assert (path / "manifest.json").is_file()


def test_tasks_of_a_checkpoint_may_be_repeated_when_resuming(tmp_path, uninterrupted, monkeypatch):
    again = {"output": tmp_path / "out", "from_checkpoint": uninterrupted[1], "device": "cpu"}
    again["overrides"] = settings(train__save_steps=1)
    interrupt(monkeypatch, after=2, start=lambda: sparse_ft.train(["mood"], **again))
    assert list(sparse_ft.train(["mood"], resume=True, **again).tasks) == ["mood"]


@pytest.mark.parametrize(("options", "named"), [
    ({"overrides": ["train.batch_size=9"]}, "train.batch_size"),
    ({"overrides": ["experts.rank=2", "data.max_length=64"]}, "experts.rank, data.max_length"),
    ({"seed": 5}, "seed"),
    ({"backbone": "minilm2"}, "backbone"),
    ({"tasks": ["ner"]}, "tasks"),
    # Settings that happen to be the defaults are settings, too.
    ({"overrides": ["train.batch_size=32"]}, "train.batch_size"),
    ({"seed": 13}, "seed"),
    ({"backbone": "minilm"}, "backbone"),
    ({"from_checkpoint": "elsewhere"}, "(start|from)"),
    ({"data": "elsewhere"}, "(sources|data)"),
])  # fmt: skip
def test_other_settings_are_refused_by_name(interrupted, options, named):
    _, output = interrupted
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=rf"has other settings: {named}.*\. --resume continues it unchanged"):
        sparse_ft.train(output=output, resume=True, **options)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


def test_nothing_to_resume_is_said(tmp_path, uninterrupted):
    with pytest.raises(ConfigError, match=r"no unfinished run in '.*nothing' to resume\. Give --output"):
        sparse_ft.train(output=tmp_path / "nothing", resume=True)
    with pytest.raises(ConfigError, match="It holds a finished checkpoint"):
        sparse_ft.train(output=uninterrupted[1], resume=True)
    assert not (tmp_path / "nothing").exists()


def test_changed_training_rows_are_refused(interrupted, tmp_path):
    _, output = interrupted
    rows = tmp_path / "data/mood/train.jsonl"
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[1:], json.dumps({"text": "the table", "label": "bad"})]))
    with pytest.raises(CheckpointError, match=r"not those of the interrupted run in .*Put the old data back"):
        sparse_ft.train(output=output, resume=True)
    assert (output / "resume/progress.json").is_file()


def test_changed_validation_rows_are_refused(interrupted, tmp_path):
    _, output = interrupted
    write_rows(tmp_path / "data/mood/validation.jsonl", [{"text": "the table", "label": "bad"}])
    with pytest.raises(CheckpointError, match="not those of the interrupted run"):
        sparse_ft.train(output=output, resume=True)


def test_an_unfinished_run_is_not_overwritten(interrupted, tiny_bert):
    task, output = interrupted
    with pytest.raises(ConfigError, match=r"holds an unfinished run\. Add --resume to continue it"):
        run([task], tiny_bert, output)


def test_a_run_stopped_between_renames_is_not_overwritten_either(interrupted, tiny_bert):
    task, output = interrupted
    (output / "resume").rename(output / ".resume.old")
    with pytest.raises(ConfigError, match=r"holds an unfinished run\. Add --resume to continue it"):
        run([task], tiny_bert, output)


def test_a_run_stopped_between_the_last_renames_is_not_overwritten_either(interrupted, tiny_bert):
    task, output = interrupted
    output.rename(output.with_name(".out.old"))
    with pytest.raises(ConfigError, match=r"holds an unfinished run\. Add --resume to continue it"):
        run([task], tiny_bert, output)


def test_a_damaged_state_is_named(interrupted):
    _, output = interrupted
    state = output / "resume/state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"state\.safetensors' cannot be read"):
        sparse_ft.train(output=output, resume=True)


def test_a_state_of_a_version_that_trained_otherwise_is_refused(interrupted):
    _, output = interrupted
    file = output / "resume/progress.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in values.items() if key != "group"}))
    with pytest.raises(CheckpointError, match=r"is damaged or of another version: .*\['group'\]\. Start anew"):
        sparse_ft.train(output=output, resume=True)


def test_a_state_of_a_run_that_read_texts_otherwise_is_refused(interrupted):
    _, output = interrupted
    file = output / "resume/progress.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pooling": "mean"}))
    with pytest.raises(CheckpointError, match=r"reads texts by mean pooling, this version by unit\. Start anew"):
        sparse_ft.train(output=output, resume=True)


def test_the_state_holds_no_pickle_and_names_the_config(interrupted):
    task, output = interrupted
    assert sorted(file.name for file in (output / "resume").iterdir()) == [
        "config.yaml",
        "progress.json",
        "state.safetensors",
    ]
    saved = find_resume(output)
    assert (saved.seed, saved.train.batch_size, saved.tasks) == (4, 8, [task])


# Folders


def fill_with(text: str):
    return lambda folder: folders.write_bytes(folder / "file", text.encode())


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "deep/target"
    replace_folder(target, fill_with("one"))
    (target / "more").write_text("x")
    replace_folder(target, fill_with("two"))
    assert [file.name for file in target.iterdir()] == ["file"]
    assert (target / "file").read_text() == "two"
    assert [entry.name for entry in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_a_fill_that_fails_changes_nothing(tmp_path, error):
    target = tmp_path / "target"
    replace_folder(target, fill_with("one"))

    def failing(folder):
        (folder / "file").write_text("half")
        raise error

    with pytest.raises(type(error)):
        replace_folder(target, failing)
    assert (target / "file").read_text() == "one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_kill_between_the_renames_is_recovered(tmp_path, monkeypatch, kill_at):
    target = tmp_path / "target"
    replace_folder(target, fill_with("one"))
    rename, count = Path.rename, 0

    def dying(self, other):
        nonlocal count
        count += 1
        if count == kill_at:
            raise Interrupted
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process does not clean up
        with pytest.raises(Interrupted):
            replace_folder(target, fill_with("two"))
    assert target.exists() == (kill_at == 1)
    recover_folder(target)
    assert (target / "file").read_text() == "one"
    replace_folder(target, fill_with("three"))
    assert (target / "file").read_text() == "three"


def test_resumed_tensors_are_not_those_of_a_new_run(interrupted, tiny_bert, tmp_path):
    """The state counts: without it, the last step would start from fresh experts."""
    task, output = interrupted
    resumed = tensors(sparse_ft.train(output=output, resume=True).path)
    whole = tensors(run([task], tiny_bert, tmp_path / "whole", seed=4, train__batch_size=8).path)
    short = tensors(run([task], tiny_bert, tmp_path / "short", seed=4, train__batch_size=8, train__epochs=1).path)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not all(torch.equal(resumed[name], short[name]) for name in whole)
