"""Runs of several processes, as a launcher starts them, end where the run of one process ends."""

import json
import multiprocessing
import os
import signal
import socket

import pytest
import torch
from toy_checkpoints import assert_same_end
from toys import OPTIONS, POOL, run, settings, write_toy

import sparse_ft
from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.errors import ConfigError
from sparse_ft.tasks.encoded_rows import encode_rows
from sparse_ft.tasks.spec import load_task
from sparse_ft.training import processes


def in_processes(work, *arguments, world_size=2, exitcode=0):
    """Call a function in several processes at once, with the environment that a launcher gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparse_ft.training.train", "sklearn.metrics", "peft", "transformers.models.bert"])
    started = [
        context.Process(target=as_launched, args=(rank, world_size, port, work, arguments))
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=300)
    assert [process.exitcode for process in started] == [exitcode] * world_size


def as_launched(rank, world_size, port, work, arguments):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    torch.set_num_threads(1)
    work(*arguments)


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
def tasks(tmp_path_factory):
    """Task files of two toy tasks; the last batch of an epoch is smaller than the others."""
    folder = tmp_path_factory.mktemp("tasks")
    return [write_toy(folder, name, sizes=(size, 9, 8)) for name, size in (("mood", 37), ("names", 20))]


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
    in_processes(train, tasks, tiny_bert, output, settings(**OPTIONS, train__workers=1, **joint), 0)
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
    in_processes(train, tasks, tiny_bert, output, overrides, 7, exitcode=-signal.SIGKILL)
    assert not (output / "manifest.json").exists()
    in_processes(train, None, tiny_bert, output, [], 0)
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
    in_processes(check_collectives)


def test_every_process_raises_the_mistake_and_nothing_is_written(tmp_path, tiny_bert, tasks):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    in_processes(expect_refusal, tasks, tiny_bert, taken)
    assert [entry.name for entry in taken.iterdir()] == ["notes.txt"]


def expect_refusal(tasks, backbone, output):
    with pytest.raises(ConfigError, match="is not empty and no checkpoint"):
        sparse_ft.train(tasks, output=output, backbone=str(backbone), device="cpu")


def test_one_process_needs_no_group():
    assert not processes.is_distributed()
    assert (processes.world_size(), processes.rank()) == (1, 0)
    assert processes.gather("own") == ["own"]
    assert processes.gather_rows(3, lambda rows: [row + 1 for row in rows]) == [1, 2, 3]
    assert processes.rank_device(find_device("cpu")) == torch.device("cpu")


def test_rows_taken_for_one_process_keep_their_windows(tmp_path, make_model):
    spec = load_task(write_toy(tmp_path, "names", labels=["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    model = make_model("bert", {"names": ("word", 5)})
    columns = {
        "tokens": [["Ada"], ["met"] * 60, [], ["London", "and", "Lisbon"]],
        "tags": [["B-PER"], ["O"] * 60, [], ["B-LOC", "O", "B-LOC"]],
        "row": [0, 1, 2, 3],
    }
    data = encode_rows(columns, spec=spec, encoder=Encoder(model.backbone, max_length=16))
    taken = data.take([1, 3])
    assert taken.num_rows == 2
    assert taken.num_parts == [60, 3]
    assert taken.columns["tokens"] == [columns["tokens"][1], columns["tokens"][3]]
    assert {example.row for example in taken.examples} == {0, 1}
    windows = [example.input_ids for example in data.examples if example.row in (1, 3)]
    assert len(windows) > 2
    assert [example.input_ids for example in taken.examples] == windows
