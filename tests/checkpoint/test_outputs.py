"""Which folder a command may write."""

from pathlib import Path

import pytest

from sparse_ft.checkpoint import locks
from sparse_ft.checkpoint.outputs import claimed_default, claimed_output, claimed_run, default_output, free_output
from sparse_ft.errors import ConfigError


def test_a_run_is_named_after_its_tasks_unless_they_are_many():
    assert default_output(["mood", "ner"]) == Path("runs/mood-ner")
    assert default_output(list("abcd")) == Path("runs/a-b-c-d")
    assert default_output(list("abcde")) == Path("runs/5-tasks")


def test_the_next_free_folder_is_counted_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "_PATIENCE", 0.0)
    (tmp_path / "runs/mood").mkdir(parents=True)
    with claimed_default(["mood"]) as first, claimed_default(["mood"]) as second:  # two runs at once
        assert first == tmp_path / "runs/mood-2"
        assert second == tmp_path / "runs/mood-3"


@pytest.mark.parametrize(("made", "left"), [
    ([], []),
    (["runs/out"], []),
    (["runs/out/resume"], ["runs", "runs/out", "runs/out/resume"]),
    (["runs/other"], ["runs", "runs/other"]),
])  # fmt: skip
def test_a_claim_leaves_nothing_but_what_was_written(tmp_path, made, left):
    with claimed_output(tmp_path / "runs/out"):
        for name in made:
            (tmp_path / name).mkdir(parents=True)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == left


def test_a_folder_that_a_first_save_left_half_written_is_free(tmp_path):
    (tmp_path / "out/.resume.new-12ab").mkdir(parents=True)
    (tmp_path / "out/.resume.new-12ab/state.safetensors").write_text("half")
    with claimed_output(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []


def test_a_state_whose_save_was_killed_is_put_back_by_the_run_that_goes_on(tmp_path):
    (tmp_path / ".out.old/.resume.old").mkdir(parents=True)
    (tmp_path / ".out.old/.resume.old/progress.json").write_text("whole")
    with claimed_run(tmp_path / "out") as folder:
        assert (folder / "resume/progress.json").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_folder_that_another_command_writes_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 0.0)
    (tmp_path / "out/resume").mkdir(parents=True)
    with claimed_run(tmp_path / "out"):
        for claim in (claimed_output, claimed_run):
            with pytest.raises(ConfigError, match=r"out' is being written by process \d+ on"), claim(tmp_path / "out"):
                pass


def test_a_folder_that_is_empty_or_not_there_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("empty", "deep/new"):
        assert free_output(name) == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(("output", "message"), [
    (".", r"'\.' is the current folder, or holds it, which no new folder can replace"),
    ("..", r"is not empty"),
])  # fmt: skip
def test_a_folder_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch, output, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match=message):
        free_output(output)


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(ConfigError, match="disk' is a mount point, which no new folder can replace"):
        free_output(tmp_path / "disk")
    assert free_output(tmp_path / "disk/ner") == tmp_path / "disk/ner"


@pytest.mark.parametrize(("content", "message"), [
    ("out/manifest.json", r"'out' holds a checkpoint already\. Choose another --output, or move the old one away"),
    ("out/resume/config.yaml", r"'out' holds an unfinished run\. Add --resume to continue it, or choose another"),
    (".out.old/resume/config.yaml", r"'out' holds an unfinished run\."),
    ("out/notes.txt", r"'out' is not empty and no checkpoint\. Choose another --output"),
    ("out", r"'out' is a file, not a folder\. Choose another --output"),
])  # fmt: skip
def test_a_folder_in_which_something_would_be_lost_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("kept")
    with pytest.raises(ConfigError, match=message):
        free_output("out")
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["kept"]
