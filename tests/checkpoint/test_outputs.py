"""Which folder a command may write."""

from pathlib import Path

import pytest

from sparse_ft.checkpoint.outputs import default_output, free_output, give_back, next_output
from sparse_ft.errors import ConfigError


def test_a_run_is_named_after_its_tasks_unless_they_are_many():
    assert default_output(["mood", "ner"]) == Path("runs/mood-ner")
    assert default_output(list("abcd")) == Path("runs/a-b-c-d")
    assert default_output(list("abcde")) == Path("runs/5-tasks")


def test_the_next_free_folder_is_counted_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("mood", "mood-2", "mood-3"):
        folder = next_output(["mood"])
        assert folder == tmp_path / "runs" / expected
        assert folder.is_dir()  # so that no run beside takes it, too


def test_a_folder_is_given_back_only_while_it_is_empty(tmp_path):
    (tmp_path / "some/full/resume").mkdir(parents=True)
    (tmp_path / "some/empty").mkdir()
    (tmp_path / "none/empty").mkdir(parents=True)
    for name in ("some/full", "some/empty", "some/nothing", "none/empty"):
        give_back(tmp_path / name)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "some", "some/full", "some/full/resume"
    ]  # fmt: skip


def test_a_folder_that_is_empty_or_not_there_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("empty", "deep/new"):
        assert free_output(name) == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


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
