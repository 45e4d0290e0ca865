"""Runs that are killed, in processes of their own, and end where the uninterrupted run ends."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from toy_checkpoints import assert_same_end, disk, tensors
from toys import OPTIONS, POOL, run, settings, toy_rows, train_joint, write_toy

import sparse_ft
from sparse_ft.checkpoint import locks
from sparse_ft.checkpoint.locks import lock_file
from sparse_ft.checkpoint.manifest import read_metrics
from sparse_ft.checkpoint.outputs import claimed_run
from sparse_ft.errors import CheckpointError, ConfigError, DataError
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.resume import find_resume


class Killing:
    """Stands in for a function, and kills this process at the n-th call, as `kill -9` would."""

    def __init__(self, function, number: int, *, halfway: bool = False) -> None:
        self.function, self.number, self.halfway = function, number, halfway

    def __call__(self, *args, **kwargs):
        self.number -= 1
        if self.number == 0 and self.halfway:  # of write_bytes
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
        resume.write_bytes = Killing(resume.write_bytes, number, halfway=True)
    elif moment == "in final save":
        checkpoint.write_bytes = Killing(checkpoint.write_bytes, number, halfway=True)
    elif moment == "between renames":  # three a save but the first: old away, new in, old off
        renames = Killing(Path.rename, 3 * number - 4)
        Path.rename = lambda path, target: renames(path, target)
    elif moment == "before scores":
        training._score = lambda *args, **kwargs: die()
    else:  # the old folder of the run is moved away last of all
        rename = Path.rename
        Path.rename = lambda path, target: (rename(path, target), die() if path == output else None)
    stage = "joint" if joint else None
    overrides = settings(**OPTIONS, **joint)
    sparse_ft.train(tasks, backbone=backbone, output=output, overrides=overrides, device="cpu", stage=stage)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_bert):
    """Task files, and the checkpoint of the run that nobody killed."""
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
    ("after step", 12),  # in the first epoch of the second task
    ("in save", 3),  # two files go through write_bytes a save: the tensors of the second one
    ("after epoch", 2),  # the last of the first task
    ("between renames", 3),
    ("in final save", 3),
    ("between final renames", 1),
]


@pytest.mark.parametrize(("moment", "number"), MOMENTS, ids=[f"{moment} {number}" for moment, number in MOMENTS])
def test_a_killed_run_ends_where_the_uninterrupted_one_ends(tmp_path, tiny_bert, uninterrupted, moment, number):
    tasks, expected = uninterrupted
    output = tmp_path / "out"
    killed_run(tasks, tiny_bert, output, moment, number)
    assert not (output / "manifest.json").exists()
    if moment == "after step":  # killed once more, in the resumed run
        interrupt(after=2, start=lambda: sparse_ft.train(output=output, resume=True))
    result = sparse_ft.train(output=output, resume=True)
    assert_same_end(result.path, expected)
    assert len(result.history) == 4


def test_a_run_that_was_killed_in_its_first_save_starts_anew(tmp_path, tiny_bert, uninterrupted):
    tasks, expected = uninterrupted
    killed_run(tasks, tiny_bert, tmp_path / "out", "in save", 1)
    with pytest.raises(ConfigError, match="killed before its first save, leave --resume out to start it anew"):
        sparse_ft.train(output=tmp_path / "out", resume=True)
    assert_same_end(run(tasks, tiny_bert, tmp_path / "out", **OPTIONS).path, expected)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


def test_a_run_that_was_killed_before_its_scores_is_scored_when_resumed(tmp_path, tiny_bert, uninterrupted):
    tasks, expected = uninterrupted
    output = tmp_path / "out"
    killed_run(tasks, tiny_bert, output, "before scores")
    assert "metrics" not in read_metrics(output)["mood"]
    with pytest.raises(ConfigError, match="has other settings: seed"):
        sparse_ft.train(output=output, resume=True, seed=5)
    result = sparse_ft.train(output=output, resume=True)
    assert_same_end(result.path, expected)
    assert result.scores == {task: entry["metrics"] for task, entry in read_metrics(expected).items()}
    assert list(result.tasks) == ["mood", "names"]
    with pytest.raises(ConfigError, match="holds a finished checkpoint"):
        sparse_ft.train(output=output, resume=True)


@pytest.mark.parametrize(("gate", "pool", "moment", "number"), [
    ("token", POOL, "after step", 5),
    ("sequence", POOL, "in save", 6),
    ("sequence", {}, "after step", 3),  # its gate was fitted before the first step
])  # fmt: skip
def test_a_killed_joint_run_ends_where_the_uninterrupted_one_ends(
    tmp_path, tiny_bert, uninterrupted, gate, pool, moment, number
):
    tasks, joint = uninterrupted[0], {"gate__type": gate, "gate__jitter": 0.1, "train__workers": 1, **pool}
    expected = train_joint(tasks, tiny_bert, tmp_path / "expected", **OPTIONS, **joint)
    output = tmp_path / "out"
    killed_run(tasks, tiny_bert, output, moment, number, joint)
    assert not (output / "manifest.json").exists()
    with pytest.raises(ConfigError, match="has other settings: stage"):
        sparse_ft.train(output=output, resume=True, stage="experts")
    result = sparse_ft.train(output=output, resume=True)
    assert_same_end(result.path, expected.path)
    assert result.history == expected.history  # the gate's losses and the use of the experts, too


class Interrupted(BaseException):
    pass


def interrupt(*, after: int, start) -> None:
    """Stop a run of this process after some steps."""
    from sparse_ft.training import loop as fitting

    step, count = fitting._Loop.step, 0

    def stopping(self, pairs):
        nonlocal count
        step(self, pairs)
        count += 1
        if count == after:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting._Loop, "step", stopping)
        with pytest.raises(Interrupted):
            start()


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


def test_tasks_of_a_checkpoint_may_be_repeated_when_resuming(tmp_path, uninterrupted):
    again = {"output": tmp_path / "out", "from_checkpoint": uninterrupted[1], "device": "cpu"}
    again["overrides"] = settings(train__save_steps=1, train__epochs=1)
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


def test_without_a_state_there_is_nothing_to_resume(tmp_path, uninterrupted):
    for output, said in ((tmp_path / "nothing", "nothing'"), (uninterrupted[1], "a finished checkpoint")):
        with pytest.raises(ConfigError, match=said):
            sparse_ft.train(output=output, resume=True)
    assert not (tmp_path / "nothing").exists()


def test_the_state_holds_no_pickle_and_names_the_config(stopped):
    files = sorted(file.name for file in (stopped / "out/resume").iterdir())
    assert files == ["config.yaml", "progress.json", "state.safetensors"]
    saved = find_resume(stopped / "out")
    assert (saved.seed, saved.train.batch_size, saved.tasks) == (4, 8, [str(stopped / "data/mood.yaml")])
