"""One process at a time writes a folder; processes that die leave no lock."""

import json
import multiprocessing
import os
import signal
import socket

import pytest

from sparse_ft.checkpoint import locks
from sparse_ft.checkpoint.locks import check_locks, check_unlocked, is_held, lock_file, locked
from sparse_ft.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 0.0)


def hold(folder, ready):
    with locked(folder):
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """A process that has locked ``tmp_path / "ner"``."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "ner", ready))
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_a_lock_names_its_process_and_is_gone_afterwards(tmp_path):
    folder = tmp_path / "ner"
    with locked(folder):
        content = json.loads(lock_file(folder).read_text())
        assert content == {"pid": os.getpid(), "host": socket.gethostname()}
        assert is_held(folder)
        assert is_held(folder / "resume")
        assert not is_held(tmp_path / "ner2")
        check_unlocked(folder)  # it is ours
        with pytest.raises(ConfigError, match=f"ner' is being written by process {os.getpid()} on"), locked(folder):
            pass  # nor may another thread write it
        check_locks()
    assert not is_held(folder)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_process_is_refused_until_that_is_dead(tmp_path, holder):
    folder = tmp_path / "ner"
    for attempt in (check_unlocked, lambda folder: locked(folder).__enter__()):
        with pytest.raises(ConfigError, match=f"is being written by process {holder.pid} on {socket.gethostname()}"):
            attempt(folder)
    holder.kill()
    holder.join()
    assert lock_file(folder).exists()  # left by the dead
    check_unlocked(folder)
    with locked(folder):
        assert json.loads(lock_file(folder).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_child_of_a_fork_has_no_part_in_the_locks_of_its_parent(tmp_path):
    folder = tmp_path / "ner"
    with locked(folder):
        child = os.fork()
        if child == 0:  # lives on while the parent releases its lock
            signal.pause()
    with locked(folder):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("take", [lambda file: file.unlink(), lambda file: (file.unlink(), file.write_text("{}"))])
def test_a_lock_that_was_taken_away_is_noticed(tmp_path, take):
    with locked(tmp_path / "ner"):
        take(lock_file(tmp_path / "ner"))
        with pytest.raises(
            CheckpointError, match=r"ner' was taken over by another process.*Nothing there is overwritten"
        ):
            check_locks()


@pytest.mark.parametrize(("content", "free"), [
    ({}, True),
    ({"pid": os.getpid(), "host": socket.gethostname()}, True),  # of this number, but not this process
    ({"pid": os.getppid(), "host": socket.gethostname()}, False),
    ({"pid": 2**22 + 1, "host": socket.gethostname()}, True),
    ({"pid": 7, "host": "another"}, False),
])  # fmt: skip
def test_where_the_file_system_knows_no_locks_the_content_of_the_file_decides(tmp_path, monkeypatch, content, free):
    def unknown(descriptor, operation):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unknown)
    lock_file(tmp_path / "ner").write_text(json.dumps(content))
    if free:
        with locked(tmp_path / "ner"):
            check_locks()
    else:
        with (
            pytest.raises(ConfigError, match=f"by process {content['pid']} on {content['host']}"),
            locked(tmp_path / "ner"),
        ):
            pass
