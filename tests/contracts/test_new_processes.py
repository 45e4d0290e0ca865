"""What only a new process can show: it computes the same logits, resumes a killed run, and trains with others.

One server forks all of them, so that the libraries are imported once.
"""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import safetensors.torch
import torch
from toy_checkpoints import assert_same_end, interrupt
from toys import JOINT, OPTIONS, POOL, run, settings, train_joint, write_toy

import sparse_ft
from sparse_ft.checkpoint.manifest import read_metrics
from sparse_ft.errors import ConfigError
from sparse_ft.prediction.baselines import HashChooser
from sparse_ft.training import processes


def in_new_processes(work, *arguments, environments=({},), exitcode=0):
    """Call a function in a new process for each environment, all at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparse_ft.training.train", "sklearn.metrics", "peft", "transformers.models.bert"])
    started = [context.Process(target=_begin, args=(one, work, arguments)) for one in environments]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=300)
    assert [process.exitcode for process in started] == [exitcode] * len(started)


def _begin(environment, work, arguments):
    os.environ.update(environment, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    work(*arguments)


# Load in a new process gives the logits that were there at save, bit for bit

TEXTS = ["the table loved", "", "Ada Lovelace met Mozart in London", "at six " * 60]


def compute(paths, output):
    rows = {"hash": HashChooser(3).choose(TEXTS).experts.contiguous()}
    for number, path in enumerate(paths):
        model = sparse_ft.load(path, device="cpu")
        rows[f"{number}/mood"] = model.logits(TEXTS, "mood")
        rows |= {f"{number}/names/{index}": row for index, row in enumerate(model.logits(TEXTS, "names"))}
    safetensors.torch.save_file(rows, output)


def test_a_new_process_computes_the_same_logits_and_hashes(toys, joint_toys, tmp_path):
    paths = [toys, *map(joint_toys, JOINT)]
    compute(paths, tmp_path / "here")
    in_new_processes(compute, paths, tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


# Kill at any moment, resume, and end where the uninterrupted run ends


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
def tasks(tmp_path_factory):
    """Task files of two toy tasks; the last batch of an epoch is smaller than the others."""
    folder = tmp_path_factory.mktemp("tasks")
    return [write_toy(folder, name, sizes=(size, 8, 8)) for name, size in (("mood", 21), ("names", 12))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_bert, tasks):
    """The checkpoint of the run that nobody killed."""
    return run(tasks, tiny_bert, tmp_path_factory.mktemp("uninterrupted") / "out", **OPTIONS).path


def killed_run(tasks, backbone, output, moment, number=1, joint=None) -> None:
    arguments = (tasks, str(backbone), output, moment, number, joint or {})
    in_new_processes(train_and_die, *arguments, exitcode=-signal.SIGKILL)


MOMENTS = [
    ("after step", 8),  # in the first epoch of the second task
    ("in save", 3),  # two files go through write_bytes a save: the tensors of the second one
    ("after epoch", 2),  # the last of the first task
    ("between renames", 3),
    ("in final save", 3),
    ("between final renames", 1),
]


@pytest.mark.parametrize(("moment", "number"), MOMENTS, ids=[f"{moment} {number}" for moment, number in MOMENTS])
def test_a_killed_run_ends_where_the_uninterrupted_one_ends(tmp_path, tiny_bert, tasks, uninterrupted, moment, number):
    output = tmp_path / "out"
    killed_run(tasks, tiny_bert, output, moment, number)
    assert not (output / "manifest.json").exists()
    if moment == "after step":  # killed once more, in the resumed run
        interrupt(after=2, start=lambda: sparse_ft.train(output=output, resume=True))
    result = sparse_ft.train(output=output, resume=True)
    assert_same_end(result.path, uninterrupted)
    assert len(result.history) == 4


def test_a_run_that_was_killed_in_its_first_save_starts_anew(tmp_path, tiny_bert, tasks, uninterrupted):
    killed_run(tasks, tiny_bert, tmp_path / "out", "in save", 1)
    with pytest.raises(ConfigError, match="killed before its first save, leave --resume out to start it anew"):
        sparse_ft.train(output=tmp_path / "out", resume=True)
    assert_same_end(run(tasks, tiny_bert, tmp_path / "out", **OPTIONS).path, uninterrupted)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


def test_a_run_that_was_killed_before_its_scores_is_scored_when_resumed(tmp_path, tiny_bert, tasks, uninterrupted):
    output = tmp_path / "out"
    killed_run(tasks, tiny_bert, output, "before scores")
    assert "metrics" not in read_metrics(output)["mood"]
    with pytest.raises(ConfigError, match="has other settings: seed"):
        sparse_ft.train(output=output, resume=True, seed=5)
    result = sparse_ft.train(output=output, resume=True)
    assert_same_end(result.path, uninterrupted)
    assert result.scores == {task: entry["metrics"] for task, entry in read_metrics(uninterrupted).items()}
    assert list(result.tasks) == ["mood", "names"]
    with pytest.raises(ConfigError, match="holds a finished checkpoint"):
        sparse_ft.train(output=output, resume=True)


@pytest.mark.parametrize(("gate", "pool", "moment", "number"), [
    ("token", POOL, "in save", 6),
    ("sequence", {}, "after step", 3),  # its gate was fitted before the first step
])  # fmt: skip
def test_a_killed_joint_run_ends_where_the_uninterrupted_one_ends(
    tmp_path, tiny_bert, tasks, gate, pool, moment, number
):
    joint = {"gate__type": gate, "gate__jitter": 0.1, "train__workers": 1, **pool}
    expected = train_joint(tasks, tiny_bert, tmp_path / "expected", **OPTIONS, **joint)
    output = tmp_path / "out"
    killed_run(tasks, tiny_bert, output, moment, number, joint)
    assert not (output / "manifest.json").exists()
    with pytest.raises(ConfigError, match="has other settings: stage"):
        sparse_ft.train(output=output, resume=True, stage="experts")
    result = sparse_ft.train(output=output, resume=True)
    assert_same_end(result.path, expected.path)
    assert result.history == expected.history  # the gate's losses and the use of the experts, too


# Runs of several processes, as a launcher starts them, end where the run of one process ends


def in_two_processes(work, *arguments, exitcode=0):
    """Call a function in two processes, with the environment that a launcher gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **address} for rank in "01"]
    in_new_processes(work, *arguments, environments=ranks, exitcode=exitcode)


def train(tasks, backbone, output, overrides, die_at):
    from sparse_ft.training import loop as fitting

    if die_at:
        step = fitting._Loop.step

        def mortal(loop, pairs):
            step(loop, pairs)
            if loop.progress.step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        fitting._Loop.step = mortal
    options = {"resume": True} if tasks is None else {"backbone": str(backbone), "device": "cpu"}
    result = sparse_ft.train(tasks or (), output=output, overrides=overrides, **options)
    report = {"history": result.history, "scores": result.scores}
    (output.parent / f"report-{processes.rank()}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory, tiny_bert, tasks):
    """The run of one process with two workers."""
    return run(tasks, tiny_bert, tmp_path_factory.mktemp("workers") / "out", **OPTIONS, train__workers=2)


@pytest.mark.parametrize("joint", [{}, {"gate__type": "token", **POOL}], ids=["experts", "joint"])
def test_two_processes_train_what_two_workers_train(tmp_path, tiny_bert, tasks, by_workers, joint):
    """Bit for bit: the parts of a batch, their random numbers and the order of their sum are the same."""
    expected = by_workers
    if joint:
        expected = run(tasks, tiny_bert, tmp_path / "expected", **OPTIONS, train__workers=2, **joint)
    output = tmp_path / "both" / "out"
    in_two_processes(train, tasks, tiny_bert, output, settings(**OPTIONS, train__workers=1, **joint), 0)
    for file in sorted(expected.path.rglob("*.safetensors")):
        name = file.relative_to(expected.path)
        assert (output / name).read_bytes() == file.read_bytes(), name
    first, second = (json.loads((output.parent / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["scores"] == expected.scores
    for ours, theirs in zip(first["history"], expected.history, strict=True):
        assert ours["validation"] == theirs["validation"]
        for task, loss in theirs["loss"].items():
            assert ours["loss"][task] == pytest.approx(loss, rel=1e-6)
        assert ours.get("usage", {}) == pytest.approx(theirs.get("usage", {}), rel=1e-5)


def test_killed_processes_resume_and_end_where_the_uninterrupted_run_ends(tmp_path, tiny_bert, tasks, by_workers):
    overrides, output = settings(**OPTIONS, train__workers=1), tmp_path / "killed" / "out"
    in_two_processes(train, tasks, tiny_bert, output, overrides, 5, exitcode=-signal.SIGKILL)
    assert not (output / "manifest.json").exists()
    in_two_processes(train, None, tiny_bert, output, [], 0)
    assert_same_end(output, by_workers.path)


def check_collectives():
    error = None
    try:
        processes.broadcast(refuse)
    except ConfigError as found:
        error = str(found)
    assert error == "no such thing"
    assert processes.broadcast(processes.rank) == 0
    assert processes.world_size() == 2
    assert processes.gather(processes.rank()) == [0, 1]
    assert processes.gather_rows(5, lambda rows: [(row, processes.rank()) for row in rows]) == [
        (0, 0),
        (1, 1),
        (2, 0),
        (3, 1),
        (4, 0),
    ]
    assert processes.gather_rows(1, lambda rows: [row * 10 for row in rows]) == [0]
    both, one, none = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    both.grad = torch.full((2, 3), processes.rank() + 1.0)
    if processes.rank() == 1:
        one.grad = torch.full((2, 3), 5.0)
    processes.all_reduce_gradients([both, one, none])
    assert both.grad.tolist() == [[3.0] * 3] * 2
    assert one.grad.tolist() == [[5.0] * 3] * 2
    assert none.grad is None
    assert processes.rank_device(torch.device("cpu")) == torch.device("cpu")
    assert processes.rank_device(torch.device("cuda")) == torch.device("cuda", processes.rank())
    assert processes.rank_device(torch.device("cuda:7")) == torch.device("cuda:7")


def refuse():
    assert processes.rank() == 0
    raise ConfigError("no such thing")


def test_collectives_reach_every_process():
    in_two_processes(check_collectives)


def test_every_process_raises_the_mistake_and_nothing_is_written(tmp_path, tiny_bert, tasks):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    in_two_processes(expect_refusal, tasks, tiny_bert, taken)
    assert [entry.name for entry in taken.iterdir()] == ["notes.txt"]


def expect_refusal(tasks, backbone, output):
    with pytest.raises(ConfigError, match="is not empty and no checkpoint"):
        sparse_ft.train(tasks, output=output, backbone=str(backbone), device="cpu")
