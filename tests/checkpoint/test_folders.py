import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sparse_ft.checkpoint.folders import (
    claimed,
    explain_os_errors,
    recover_folder,
    replace_folder,
    write_bytes,
    write_json,
)
from sparse_ft.errors import CheckpointError


def fill_with(**files):
    def fill(folder):
        for name, content in files.items():
            (folder / name).write_text(content)

    return fill


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_created_with_its_parents_and_nothing_lies_beside_it(tmp_path):
    target = tmp_path / "runs" / "new" / "ner"
    replace_folder(target, fill_with(a="1", b="2"))
    assert content_of(target) == {"a": "1", "b": "2"}
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "ner"
    replace_folder(target, fill_with(a="old", b="old"))
    replace_folder(target, fill_with(b="new", c="new"))
    assert content_of(target) == {"b": "new", "c": "new"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "scores.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "far" / "scores.json")
    write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "far" / "scores.json").read_text()) == [1]
    assert [file.name for file in (tmp_path / "far").iterdir()] == ["scores.json"]


def test_what_is_no_file_is_written_as_it_is(tmp_path):
    read, write = os.pipe()
    write_bytes(Path(f"/dev/fd/{write}"), b"scores")
    assert os.read(read, 6) == b"scores"
    os.close(read)
    os.close(write)


def test_what_killed_processes_staged_is_removed_and_what_others_stage_is_not(tmp_path):
    target = tmp_path / "run[1]"
    ours, dead, alive, foreign = (tmp_path / f".{name}.new-a" for name in ("run[1]", "run1", "run2", "notes"))
    for folder in (ours, dead, alive, foreign):
        folder.mkdir()
        (folder / "weights").write_text("half")
    for name in ("run1", ".run1.old"):  # killed between moving the new one in and the old one off
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / ".package.lock").write_text("{}")  # of another program
    (tmp_path / ".run1.lock").write_text('{"pid": 1, "host": "here"}')  # its process is gone, or the lock would be
    with claimed(tmp_path / "run2"):
        (tmp_path / ".run2.new-a").mkdir(exist_ok=True)
        replace_folder(target, fill_with(a="new"))
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".notes.new-a", ".package.lock", ".run2.lock", ".run2.new-a", "run1", "run[1]"
        ]  # fmt: skip
        assert content_of(tmp_path / "run1") == {"weights": "run1"}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_the_umask_whoever_wrote_the_files(tmp_path, mask):
    def fill(folder):
        write_bytes(folder / "ours", b"1")
        (folder / "inner").mkdir()
        with tempfile.NamedTemporaryFile(dir=folder / "inner", delete=False) as file:  # for its owner alone
            file.write(b"2")

    before = os.umask(mask)
    try:
        replace_folder(tmp_path / "ner", fill)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "ner").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}
    assert (tmp_path / "ner").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, CheckpointError])
def test_a_failure_while_filling_leaves_the_old_folder_and_no_rest(tmp_path, error):
    target = tmp_path / "ner"
    replace_folder(target, fill_with(a="old"))

    def fill(folder):
        (folder / "a").write_text("half")
        assert content_of(target) == {"a": "old"}  # not touched before the new one is complete
        raise error

    with pytest.raises(error):
        replace_folder(target, fill)
    assert content_of(target) == {"a": "old"}
    assert list(tmp_path.iterdir()) == [target]


_KILLED = """
import os, sys
from pathlib import Path
from sparse_ft.checkpoint import folders

target, at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def counted(function):
    def call(*arguments, **named):
        global calls
        if calls == at:
            os.kill(os.getpid(), 9)
        calls += 1
        return function(*arguments, **named)
    return call

Path.rename = counted(Path.rename)
os.fsync = counted(os.fsync)
folders.shutil.rmtree = counted(folders.shutil.rmtree)

def fill(folder):
    folders.write_bytes(folder / "a", b"new")
    folders.write_bytes(folder / "manifest", b"new")

folders.replace_folder(target, fill)
print(calls)
"""


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path):
    def save(target, at):
        return subprocess.run(
            [sys.executable, "-c", _KILLED, str(target), str(at)], capture_output=True, text=True, check=False
        )

    outcomes = []
    for moment in range(100):
        target = tmp_path / str(moment) / "ner"
        replace_folder(target, fill_with(a="old", manifest="old"))
        killed = save(target, moment).returncode == -9
        recover_folder(target)
        state = content_of(target)
        assert state in ({"a": "old", "manifest": "old"}, {"a": "new", "manifest": "new"}), moment
        outcomes.append(state["a"])
        replace_folder(target, fill_with(a="later"))  # and the next save works
        assert content_of(target) == {"a": "later"}
        if not killed:
            break
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, reverse=True)  # old up to one moment, new from there on
    assert 6 < len(outcomes) < 30


def test_recover_folder_prefers_the_folder_that_is_there(tmp_path):
    target, old = tmp_path / "ner", tmp_path / ".ner.old"
    replace_folder(target, fill_with(a="new"))
    replace_folder(old, fill_with(a="old"))
    recover_folder(target)
    assert content_of(target) == {"a": "new"}
    assert not old.exists()  # it is obsolete, and does not come back when the new one is moved away
    target.rename(tmp_path / "elsewhere")
    recover_folder(target)
    assert not target.exists()
    recover_folder(tmp_path / "never-there")
    assert not (tmp_path / "never-there").exists()


def test_json_is_read_back_as_it_was_and_names_stay_readable(tmp_path):
    content = {"labels": ["积极", "é"], "score": 0.25, "nothing": None}
    write_json(tmp_path / "deep" / "x.json", content)
    text = (tmp_path / "deep" / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "积极" in text
    assert text.endswith("}\n")


def test_written_bytes_are_synced_before_write_bytes_returns(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watch(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_bytes(tmp_path / "x", b"1234567")
    assert synced == [7]


# What the operating system refuses, and in which words.


def raised_by(code, *, filename=None):
    return OSError(code, os.strerror(code), filename)


@pytest.mark.parametrize(("code", "message"), [
    (errno.ENOSPC, r"'.*ner' cannot be written: no space left on the disk \(\d+ MiB free\)\. Free some"),
    (errno.EDQUOT, r"no space left on the disk"),
    (errno.EACCES, r"'.*ner' cannot be written: no write permission \(.*ner\)\. Choose another folder"),
    (errno.EPERM, r"no write permission"),
    (errno.EROFS, r"no write permission"),
    (errno.ENOTDIR, r"ner is a file, not a folder\. Choose another folder"),
    (errno.EIO, r"'.*ner' cannot be written: Input/output error\."),
])  # fmt: skip
def test_refusals_of_the_operating_system_are_explained_and_the_folder_stays(tmp_path, code, message):
    target = tmp_path / "ner"
    replace_folder(target, fill_with(a="old"))

    def fill(folder):
        raise raised_by(code)

    with pytest.raises(CheckpointError, match=message) as caught:
        replace_folder(target, fill)
    assert isinstance(caught.value.__cause__, OSError)
    assert content_of(target) == {"a": "old"}


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(CheckpointError, match=r"'.*runs/ner' cannot be written: .*runs.* is a file, not a folder"):
        replace_folder(tmp_path / "runs" / "ner", fill_with(a="1"))
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="no write permission"):
        replace_folder(tmp_path / "locked" / "ner", fill_with(a="1"))


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ValueError, match="mine"), explain_os_errors(tmp_path):
        raise ValueError("mine")
    with explain_os_errors(tmp_path):
        pass
