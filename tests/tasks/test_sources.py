"""Which rows of a source are scored, and what is said of a division."""

import json
import logging

import pandas
import pytest

from sparse_ft.errors import ConfigError, DataError
from sparse_ft.tasks.reading import read_divided
from sparse_ft.tasks.sources import name_sources, read_scored, say_division, scored_splits
from sparse_ft.tasks.spec import Division, TaskSpec

ROWS = [{"text": f"text {number}", "label": "abcdef"[number % 6]} for number in range(60)]


@pytest.fixture
def file(tmp_path):
    def write(name, rows=ROWS):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def trained(source, **division):
    """Return the task as a training on the source leaves it."""
    spec = TaskSpec(name="toy", kind="classification", metric="accuracy", labels=list("abcdef"),
                    division=Division(**division) if division else None)  # fmt: skip
    return spec.model_copy(update={"division": read_divided(spec, data=source).division})


def test_another_file_is_scored_whole_and_a_copy_of_the_trained_one_in_its_held_out_part(file):
    spec = trained(file("rows.jsonl"))
    test = read_scored(spec, "test", file("rows.jsonl"))
    assert (len(test.rows), test.name, test.held_out) == (6, "test", True)
    for source in (file("copy.jsonl"), pandas.DataFrame(ROWS), str(file("rows.jsonl"))):
        assert read_scored(spec, "test", source).rows.to_dict() == test.rows.to_dict()
    assert len(read_scored(spec, "validation", file("copy.jsonl")).rows) == 6
    assert len(read_scored(spec, "train", file("copy.jsonl")).rows) == 48
    for rows in (ROWS[:20], ROWS[:1], [*ROWS, {"text": "new", "label": "odd"}]):
        for split in ("test", "train"):
            whole = read_scored(spec, split, file("other.jsonl", rows), trained_on=str(file("rows.jsonl")))
            assert (whole.rows["text"], whole.name) == ([row["text"] for row in rows], "other.jsonl")
            assert not whole.held_out
    frame = read_scored(spec, "test", pandas.DataFrame(ROWS[:20]), trained_on=str(file("rows.jsonl")))
    assert (len(frame.rows), frame.name) == (20, "DataFrame in memory")


def test_a_file_that_has_changed_since_the_training_is_named(file, caplog):
    path = file("rows.jsonl")
    spec = trained(path)
    file("rows.jsonl", ROWS[:-2])
    assert len(read_scored(spec, "test", path, trained_on=str(path)).rows) == 5
    assert "rows.jsonl has changed since the training on it" in caplog.text


def test_a_checkpoint_without_a_digest_knows_its_file_by_the_path(file):
    spec, path = trained(file("rows.jsonl")), file("rows.jsonl")
    spec = spec.model_copy(update={"division": Division(rule="random")})  # as the reader of checkpoints has it
    assert len(read_scored(spec, "test", path, trained_on=str(path)).rows) == 6
    assert len(read_scored(spec, "test", file("other.jsonl"), trained_on=str(path)).rows) == 60
    assert len(read_scored(spec, "test", pandas.DataFrame(ROWS), trained_on=str(path)).rows) == 60
    assert len(read_scored(spec, "test", pandas.DataFrame(ROWS)).rows) == 6  # perhaps the rows of the training
    moved = file("moved.jsonl").rename(path.parent / "elsewhere.jsonl")
    assert len(read_scored(spec, "test", moved, trained_on="/gone/elsewhere.jsonl").rows) == 6


def test_a_task_that_was_trained_on_all_rows_has_none_to_score(file):
    path = file("rows.jsonl")
    spec = trained(path, rule="all")
    assert scored_splits({"toy": spec}, {"toy": str(path)}) == {}
    with pytest.raises(DataError, match=r"'toy' was trained on all its rows, so none is held out for test\. Give oth"):
        read_scored(spec, "test", path)
    assert len(read_scored(spec, "train", path).rows) == 60
    assert len(read_scored(spec, "test", file("other.jsonl", ROWS[:9])).rows) == 9


def test_the_train_split_of_a_folder_is_no_test(file):
    path = file("train.jsonl")
    files = {"format": "jsonl", "train": path.name}
    spec = TaskSpec.model_validate({"name": "toy", "kind": "classification", "metric": "accuracy", "files": files})
    spec = spec.model_copy(update={"division": read_divided(spec, data=path.parent).division})
    assert (spec.division.train, spec.division.validation, spec.division.test) == (54, 6, 0)
    with pytest.raises(DataError, match=r"train\.jsonl holds the rows that task 'toy' was trained on as its train"):
        read_scored(spec, "test", path)
    assert len(read_scored(spec, "test", file("other.jsonl", ROWS[:7])).rows) == 7


@pytest.mark.parametrize(("rows", "division", "lines"), [
    (ROWS, {}, ["rows.jsonl has no splits: its 60 rows are divided into 48 for train, 6 for validation and 6 for test "
                "(stratified, seed 13).",
                "Task toy: test has 6 rows (a 1, b 1, c 1, d 1, e 1, f 1), so its scores say little. `--folds 5` tests "
                "every row once."]),
    (ROWS * 1 + [{"text": f"more {row}", "label": "abcdef"[row % 6]} for row in range(600)], {"rule": "stratified"},
     ["rows.jsonl has no splits: its 660 rows are divided into 528 for train, 66 for validation and 66 for test "
      "(stratified, seed 13)."]),
    (ROWS, {"rule": "all"}, ["Task toy: all 60 rows are trained on, so none is left to score."]),
    (ROWS, {"rule": "stratified", "fold": (1, 5)}, []),
])  # fmt: skip
def test_a_division_is_said(file, caplog, rows, division, lines):
    path = file("rows.jsonl", rows)
    with caplog.at_level(logging.INFO, logger="sparse_ft"):
        spec = trained(path, **division)
        read_scored(spec, "train", path)
        assert caplog.messages == []
        say_division(spec, str(path))
    assert caplog.messages == lines


def reading(name, column, kind="classification"):
    answer = {"classification": "label", "token_classification": "spans"}[kind]
    return TaskSpec(name=name, kind=kind, columns={"text": "body", answer: column}, metric="accuracy")


def test_one_file_serves_tasks_that_read_different_columns(tmp_path):
    file = tmp_path / "mails.csv"
    file.write_text("body,intent,mood\n")
    specs = [reading("intent", "intent"), reading("mood", "mood"), reading("names", "names", "token_classification")]
    names = [spec.name for spec in specs]
    assert name_sources(file, names, specs=specs) == dict.fromkeys(names, str(file))


def test_one_file_does_not_serve_tasks_that_read_the_same_column(tmp_path):
    file = tmp_path / "mails.csv"
    file.write_text("body,label\n")
    with pytest.raises(ConfigError, match=r"'a' and 'b' would both read their answers from the column 'label'"):
        name_sources(file, ["a", "b"], specs=[reading("a", "label"), reading("b", "label")])
    with pytest.raises(ConfigError, match="names no task, but there are 2"):
        name_sources(tmp_path, ["a", "b"], specs=[reading("a", "x"), reading("b", "y")])
    with pytest.raises(ConfigError, match="names no task, but there are 2"):
        name_sources(file, ["a", "b"])
