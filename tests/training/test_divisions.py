"""Runs on rows without splits: what is held out, what a checkpoint records, folds, and the number of steps."""

import json

import pytest
import yaml
from toys import FILLERS, settings, write_rows, write_toy

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import ConfigError, DataError


def one_file(folder, sizes=(36, 24)):
    """Write a task and one file of its rows, in two classes that a word tells apart."""
    words = ("loved", "boring")
    rows = [
        {"text": f"the {FILLERS[number % 15]} {words[index]} {FILLERS[number % 13]}", "label": "ab"[index]}
        for index, size in enumerate(sizes)
        for number in range(size)
    ]
    write_rows(folder / "rows.jsonl", rows)
    task = folder / "mine.yaml"
    task.write_text("{name: mine, kind: classification, metric: accuracy, labels: [a, b]}")
    return str(task), str(folder / "rows.jsonl"), rows


def test_a_checkpoint_records_its_division_and_the_line_is_said_once(tmp_path, tiny_bert, caplog):
    task, data, rows = one_file(tmp_path)
    with caplog.at_level("INFO", logger="sparse_ft"):
        result = sparse_ft.train(task, data=data, output=tmp_path / "out", backbone=str(tiny_bert), device="cpu",
                                 overrides=settings(train__epochs=1))  # fmt: skip
    assert sum("has no splits" in text for text in caplog.messages) == 1
    assert sum("test has 6 rows (b 2, a 4)" in text for text in caplog.messages) == 1
    division = load_checkpoint(result.path).tasks["mine"].division
    assert (division.rule, division.train, division.validation, division.test) == ("stratified", 48, 6, 6)
    assert result.evaluation.tasks["mine"].score.n == 6
    write_rows(tmp_path / "held_out.jsonl", rows[:20])
    whole = sparse_ft.evaluate(result.path, data=tmp_path / "held_out.jsonl", device="cpu").tasks["mine"]
    assert (whole.score.n, whole.title) == (20, "mine · held_out.jsonl")
    caplog.clear()
    with caplog.at_level("INFO", logger="sparse_ft"):
        again = sparse_ft.evaluate(result.path, data=data, device="cpu").tasks["mine"]
    assert again.score.metrics == result.scores["mine"]
    assert "Task mine was trained on rows.jsonl: of its rows, the 6 held out for test are scored." in caplog.messages
    further = sparse_ft.train("mine", from_checkpoint=result.path, output=tmp_path / "more", device="cpu", data=data,
                              overrides=[*settings(train__epochs=1), "data.division=random"])  # fmt: skip
    assert load_checkpoint(further.path).tasks["mine"].division == division  # no row of the training becomes a test


def test_an_old_checkpoint_keeps_the_rows_that_it_held_out(tmp_path, tiny_bert):
    task, data, _ = one_file(tmp_path)
    result = sparse_ft.train(task, data=data, output=tmp_path / "out", backbone=str(tiny_bert), device="cpu",
                             overrides=[*settings(train__epochs=1), "data.division=random"])  # fmt: skip
    file = result.path / "tasks" / "mine.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "division"}))
    rewrite_manifest(result.path)
    old = sparse_ft.evaluate(result.path, data=data, device="cpu").tasks["mine"].score
    assert (old.n, old.metrics, old.confusion) == (6, *result_of(result))


def result_of(result):
    score = result.evaluation.tasks["mine"].score
    return score.metrics, score.confusion


def rewrite_manifest(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256", None)
    manifest["bytes"] = {name: (path / name).stat().st_size for name in manifest["bytes"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_folds_test_every_row_and_the_checkpoint_is_trained_on_all(tmp_path, tiny_bert):
    task, data, _ = one_file(tmp_path, sizes=(12, 9))
    options = {"output": tmp_path / "out", "backbone": str(tiny_bert), "device": "cpu"}
    result = sparse_ft.train(task, data=data, folds=3, overrides=settings(train__epochs=2), **options)
    folds = result.folds["mine"]
    assert (folds.rows, len(folds.folds)) == (21, 3)
    accuracies = [fold["accuracy"] for fold in folds.folds]
    assert result.scores["mine"]["accuracy"] == pytest.approx(sum(accuracies) / 3)
    written = json.loads((result.path / "metrics.json").read_text())["mine"]
    assert (written["split"], written["n"], written["metrics"]) == ("3 folds", 21, result.scores["mine"])
    division = load_checkpoint(result.path).tasks["mine"].division
    assert (division.rule, division.train) == ("all", 21)
    assert result.evaluation.tasks == {}
    with pytest.raises(DataError, match="trained on all its rows"):
        sparse_ft.evaluate(result.path, data=data, device="cpu")
    text = folds.to_text("mine").splitlines()
    assert text[0] == "mine · 3 folds (21 rows, each tested once)"
    assert text[1].split() == ["metric", "mean", "spread", "fold", "1", "fold", "2", "fold", "3"]


@pytest.mark.parametrize(("options", "said"), [
    ({"folds": 1}, "--folds is 1. Expected a whole number, at least 2"),
    ({"folds": True}, "--folds is True"),
    ({"folds": 2, "data": None}, "the data of task 'mood' has splits of its own"),
])  # fmt: skip
def test_folds_that_cannot_be_are_refused(tmp_path, tiny_bert, options, said):
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4))
    with pytest.raises(ConfigError, match=said):
        sparse_ft.train(task, output=tmp_path / "out", backbone=str(tiny_bert), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("overrides", "steps", "said"), [
    (["train.epochs=3"], [2, 4, 6], False),
    (["train.epochs=3", "train.min_steps=10"], [2, 4, 6, 8, 10], True),
    (["train.min_steps=12"], [2, 4, 6, 8, 10, 12], True),
    (["train.min_steps=0"], [2, 4, 6, 8, 10], False),
])  # fmt: skip
def test_epochs_that_are_set_win_over_the_default_of_the_fewest_steps(
    tmp_path, tiny_bert, caplog, overrides, steps, said
):
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4))
    overrides = [*overrides, "train.batch_size=4", "train.patience=0", "train.precision=fp32"]
    with caplog.at_level("INFO", logger="sparse_ft"):
        result = sparse_ft.train(task, output=tmp_path / "out", backbone=str(tiny_bert), overrides=overrides)
    assert [entry["step"] for entry in result.history] == steps
    assert any("in place of train.epochs=" in text for text in caplog.messages) == said
