"""What is scored, in which form, and what is refused. The figures themselves: contracts/test_scores.py."""

import json
import sys
from pathlib import Path

import evaluate as evaluate_library
import pytest
import yaml
from toys import KINDS, run, toy_rows, write_rows, write_toy

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.tasks.encoded_rows import examples_by_row
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import TaskSpec


@pytest.fixture(scope="module")
def evaluation(toys):
    return sparse_ft.evaluate(toys, device="cpu")


# Labels and answers that are not as in train


def test_a_label_that_train_never_had_is_an_error_and_named(tmp_path, toys, caplog):
    rows = [{"text": "the table loved", "label": label} for label in ("odd", "odd", "good", "bad")]
    write_rows(tmp_path / "test.jsonl", rows)
    score = sparse_ft.evaluate(toys, tasks=["mood"], data=tmp_path, device="cpu").tasks["mood"].score
    assert score.unseen_labels == ["odd"]
    assert score.metrics["accuracy"] == 0.25  # one text, so one answer: right for one row of four
    assert score.report["odd"] == {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 2}
    assert any("labels in test that training never had, counted as errors: odd" in text for text in caplog.messages)


def test_an_entity_type_that_train_never_had_is_an_error(tmp_path, toys, caplog):
    write_rows(tmp_path / "test.jsonl", [{"tokens": ["Ada", "in", "Geneva"], "tags": ["B-GOD", "O", "B-LOC"]}])
    score = sparse_ft.evaluate(toys, tasks=["names"], data=tmp_path, device="cpu").tasks["names"].score
    assert score.report["GOD"]["support"] == 1
    assert score.metrics["recall"] <= 0.5
    assert any("B-GOD" in text for text in caplog.messages)


def test_hidden_answers_are_refused_and_validation_is_scored_instead(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    write_rows(tmp_path / "mood/test.jsonl", [{"text": "the table", "label": None}] * 3)
    result = run([task], tiny_bert, tmp_path / "out", train__epochs=1)
    assert result.evaluation.splits == {"mood": "validation"}
    assert json.loads((result.path / "metrics.json").read_text())["mood"]["split"] == "validation"
    with pytest.raises(
        DataError, match=r"test split of task 'mood' has no answers; its publisher hides them\. Use --sp"
    ):
        sparse_ft.evaluate(result.path, device="cpu")
    write_rows(tmp_path / "mood/test.jsonl", [{"text": "the table", "label": label} for label in (None, "bad")])
    assert sparse_ft.evaluate(result.path, device="cpu").tasks["mood"].score.n == 1


def test_a_split_that_the_data_lacks_is_refused(tmp_path, tiny_bert):
    task = Path(write_toy(tmp_path, "mood", sizes=(16, 4, 4)))
    content = yaml.safe_load(task.read_text())
    del content["files"]["test"]
    task.write_text(yaml.safe_dump(content))
    result = run([str(task)], tiny_bert, tmp_path / "out", train__epochs=1)
    assert result.evaluation.splits == {"mood": "validation"}
    with pytest.raises(DataError, match=r"'mood' has no test split in its data\. Choose another with --split"):
        sparse_ft.evaluate(result.path, device="cpu")


@pytest.mark.parametrize("kind", ["span_extraction", "multiple_choice", "token_classification"])
def test_a_gate_is_shown_what_prediction_shows_it(tiny_bert, kind):
    encoder, long = Encoder(load_backbone(str(tiny_bert)), max_length=16), "the table loved London " * 8
    spec = TaskSpec(name="x", kind=kind, labels=["PER"], metric="f1")
    columns = {"row": [0, 1, 2], "text": [long, "Ada", ""], "text_pair": ["who was it", "where", ""]}
    columns["choices"] = [["Ada", "London"], ["here", "there"], ["a", "b"]]
    if kind == "token_classification":
        columns = {"row": [0, 1, 2], "tokens": [text.split() for text in columns["text"]]}
    kinds = find_kind(kind)
    examples = kinds.encode(columns, encoder=encoder, labels=["PER"], language="en")
    assert [example.row for example in examples] != [0, 1, 2]  # windows, choices, or nothing
    shown = examples_by_row(examples, columns, spec=spec, encoder=encoder)
    pairs = None if kind == "token_classification" else columns["text_pair"]
    expected = encoder.texts([long, "Ada", ""], pairs)
    assert [example.row for example in shown] == [0, 1, 2]
    assert [example.input_ids for example in shown] == [example.input_ids for example in expected]


def test_rows_known_from_train_are_scored_apart(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 10), leaks={"test": [0, 3]})
    path = run([task], tiny_bert, tmp_path / "out", train__epochs=1).path
    result = sparse_ft.evaluate(path, device="cpu")
    report = result.tasks["mood"]
    assert (report.score.n, report.unseen_rows.n) == (10, 8)
    model, rows = sparse_ft.load(path, device="cpu"), toy_rows("mood", 10, seed=2)
    right = [model(row["text"]).tasks["mood"]["label"] == row["label"] for row in rows]
    fresh = [answer for place, answer in enumerate(right) if place not in (0, 3)]
    assert report.unseen_rows.metrics["accuracy"] == pytest.approx(sum(fresh) / 8)
    assert result.to_dict()["tasks"]["mood"]["unseen_rows"]["n"] == 8
    assert "only the 8 rows whose text is not in train" in result.to_text()
    assert sparse_ft.evaluate(path, split="validation", device="cpu").tasks["mood"].unseen_rows is None
    write_rows(tmp_path / "mood/test.jsonl", rows[:1])  # known from train altogether
    report = sparse_ft.evaluate(path, device="cpu").tasks["mood"]
    assert (report.score.n, report.unseen_rows) == (1, None)


# Forms and choices


def test_the_form_of_the_json(toys, evaluation):
    content = json.loads(json.dumps(evaluation.to_dict()))
    assert list(content) == ["checkpoint", "split", "route", "tasks", "routing"]
    assert (content["checkpoint"], content["split"], content["route"]) == (str(toys), "test", "task")
    assert list(content["tasks"]) == list(KINDS)
    for entry in content["tasks"].values():
        assert entry["n"] == 32
        assert {"n", "metrics", "report"} <= set(entry) <= {"n", "metrics", "report", "token_report", "confusion"}
    assert {"accuracy", "macro_f1", "micro_f1", "weighted_f1"} <= set(content["tasks"]["mood"]["metrics"])
    tagging = content["tasks"]["names"]
    assert {"f1", "precision", "recall", "token_accuracy", "token_macro_f1"} <= set(tagging["metrics"])
    assert {"PER", "LOC"} <= set(tagging["report"])
    assert {"O", "B-PER", "I-PER", "B-LOC"} <= set(tagging["token_report"])
    assert list(content["routing"]) == ["accuracy", "usage", "entropy", "confusion", "dead"]
    assert content["routing"]["accuracy"] == 1.0
    assert content["routing"]["usage"] == {name: {name: 1.0} for name in KINDS}


def test_some_tasks_another_split_and_other_data(toys, tmp_path):
    chosen = sparse_ft.evaluate(toys, tasks=["names", "mood"], split="validation", device="cpu")
    assert list(chosen.tasks) == ["names", "mood"]
    assert chosen.to_dict()["split"] == "validation"
    write_rows(tmp_path / "test.jsonl", toy_rows("mood", 5, seed=9))
    other = sparse_ft.evaluate(toys, tasks=["mood"], data=tmp_path, device="cpu")
    assert other.tasks["mood"].score.n == 5
    mapped = sparse_ft.evaluate(toys, tasks=["mood"], data={"mood": str(tmp_path)}, device="cpu")
    assert mapped.to_dict() == other.to_dict()


def test_a_loaded_checkpoint_or_model_is_scored_without_loading_again(toys, evaluation):
    mood = evaluation.tasks["mood"].score
    assert sparse_ft.evaluate(load_checkpoint(toys), tasks=["mood"]).tasks["mood"].score == mood
    model = sparse_ft.load(toys, device="cpu")
    assert sparse_ft.evaluate(model, tasks=["mood"]).tasks["mood"].score == mood


@pytest.mark.parametrize(("options", "message"), [
    ({"tasks": ["moood"]}, r"Unknown task in this model 'moood'\. Did you mean 'mood'\?"),
    ({"split": "tset"}, r"Unknown split 'tset'\. Did you mean 'test'\?"),
    ({"route": "gaet"}, r"Unknown route 'gaet'"),
    ({"data": "here"}, r"--data 'here' names no task, but there are 4"),
    ({"data": {"mod": "here"}}, r"Unknown task in --data 'mod'\. Did you mean 'mood'\?"),
])  # fmt: skip
def test_unknown_names_are_refused(toys, options, message):
    with pytest.raises(ConfigError, match=message):
        sparse_ft.evaluate(toys, device="cpu", **options)


METRIC = """
import datasets
import evaluate

class Wrong(evaluate.Metric):
    def _info(self):
        value = datasets.Value("string")
        features = datasets.Features({"predictions": value, "references": value})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"wrong": sum(a != b for a, b in zip(predictions, references)) / len(references)}
"""


def test_a_metric_of_the_evaluate_library_decides(tmp_path, tiny_bert, monkeypatch):
    """The share of wrong answers as the metric: the best state is then the one that errs most."""
    monkeypatch.setattr(evaluate_library.loading, "init_hf_modules", lambda _=None: str(tmp_path / "modules"))
    monkeypatch.setattr(evaluate_library.config, "HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for module in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong/wrong.py").write_text(METRIC)
    metric = f"evaluate:{tmp_path / 'wrong'}"
    task = write_toy(tmp_path, "mood", metric=metric)
    result = run([task], tiny_bert, tmp_path / "out", train__epochs=9, train__patience=2, train__batch_size=8)
    scores = [entry["validation"]["mood"] for entry in result.history]
    assert len(scores) == scores.index(max(scores)) + 3 < 9  # two evaluations without a better one
    with pytest.raises(ConfigError, match="--trust-tasks"):
        sparse_ft.evaluate(result.path, split="validation", device="cpu")
    scored = sparse_ft.evaluate(result.path, split="validation", device="cpu", trust_tasks=True)
    validation = scored.tasks["mood"].score
    assert validation.metrics[metric] == pytest.approx(max(scores))
    assert validation.metrics[metric] == pytest.approx(1 - validation.metrics["accuracy"])
