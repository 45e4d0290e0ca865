"""Scores equal those of scikit-learn, seqeval and conlleval on predictions made one text at a time.

No gold entity is lost to truncation: long sentences are windowed. The figures alone: evaluation/test_metrics.py.
"""

from itertools import chain

import pytest
import sklearn.metrics
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score as entity_precision
from seqeval.metrics import recall_score as entity_recall
from toy_checkpoints import saved
from toys import toy_rows, write_rows

import sparse_ft
from sparse_ft.config import DataConfig, RunConfig
from sparse_ft.tasks.kinds.constrained_decoding import best_legal_tags


@pytest.fixture(scope="module")
def evaluation(toys):
    return sparse_ft.evaluate(toys, device="cpu")


@pytest.fixture(scope="module")
def model(toys):
    return sparse_ft.load(toys, device="cpu")


def rows_of(name: str) -> list[dict]:
    """The rows of the test split."""
    return toy_rows(name, 32, seed=2)


@pytest.mark.parametrize("name", ["mood", "reply"])
def test_classification_equals_scikit_learn(model, evaluation, name):
    rows = rows_of(name)
    texts = [(row["text"], row["text_pair"]) if name == "reply" else row["text"] for row in rows]
    gold = [row["label"] for row in rows]
    predicted = [model.predict([text], [name])[0].tasks[name]["label"] for text in texts]
    score = evaluation.tasks[name].score
    assert score.n == 32
    assert score.metrics["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(gold, predicted))
    for average in ("macro", "micro", "weighted"):
        expected = sklearn.metrics.f1_score(gold, predicted, average=average)
        assert score.metrics[f"{average}_f1"] == pytest.approx(expected)
    assert score.report == sklearn.metrics.classification_report(gold, predicted, output_dict=True, zero_division=0)
    assert score.confusion.matrix == sklearn.metrics.confusion_matrix(gold, predicted).tolist()


def test_multi_label_equals_scikit_learn(model, evaluation):
    rows = rows_of("about")
    answers = [model.predict([row["text"]], ["about"])[0].tasks["about"]["labels"] for row in rows]
    predicted = [{entry["label"] for entry in answer} for answer in answers]
    gold, guess = (
        [[int(label in labels) for label in ("football", "music")] for labels in column]
        for column in ([row["labels"] for row in rows], predicted)
    )
    metrics = evaluation.tasks["about"].score.metrics
    assert metrics["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(gold, guess))
    for average in ("macro", "micro", "weighted", "samples"):
        expected = sklearn.metrics.f1_score(gold, guess, average=average, zero_division=0)
        assert metrics[f"{average}_f1"] == pytest.approx(expected)


def test_tagging_equals_seqeval_and_scikit_learn(model, evaluation):
    rows = rows_of("names")
    tags = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    gold = [row["tags"] for row in rows]
    logits = [model.logits([" ".join(row["tokens"])], "names")[0] for row in rows]
    predicted = [[tags[index] for index in best_legal_tags(row, tags)] for row in logits]
    metrics = evaluation.tasks["names"].score.metrics
    assert metrics["f1"] == pytest.approx(entity_f1(gold, predicted))
    assert metrics["precision"] == pytest.approx(entity_precision(gold, predicted))
    assert metrics["recall"] == pytest.approx(entity_recall(gold, predicted))
    assert metrics["f1"] > 0
    flat_gold, flat_found = list(chain(*gold)), list(chain(*predicted))
    assert metrics["token_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(flat_gold, flat_found))
    expected = sklearn.metrics.f1_score(flat_gold, flat_found, average="macro", zero_division=0)
    assert metrics["token_macro_f1"] == pytest.approx(expected)


def test_the_entities_of_predict_are_those_that_are_scored(model, evaluation):
    rows = rows_of("names")
    predicted = [model.predict([" ".join(row["tokens"])], ["names"])[0].tasks["names"]["entities"] for row in rows]
    report = evaluation.tasks["names"].score.report
    right = round(report["micro avg"]["recall"] * report["micro avg"]["support"])
    assert sum(map(len, predicted)) == round(right / report["micro avg"]["precision"])


def test_no_entity_is_lost_to_the_window(tmp_path, make_model):
    rows = []
    for start in range(0, 30, 10):
        parts = toy_rows("names", 30, seed=7)[start : start + 10]
        rows.append({key: [item for part in parts for item in part[key]] for key in ("tokens", "tags")})
    write_rows(tmp_path / "long/test.jsonl", rows)
    path = saved(tmp_path, make_model, "bert", config=RunConfig(data=DataConfig(max_length=16)))
    score = sparse_ft.evaluate(path, tasks=["names"], data=tmp_path / "long", device="cpu").tasks["names"].score
    tags = [tag for row in rows for tag in row["tags"]]
    assert score.n == 3
    assert score.report["micro avg"]["support"] == sum(tag.startswith("B-") for tag in tags) == 60
    assert score.token_report["weighted avg"]["support"] == len(tags)
    for tag in set(tags):
        assert score.token_report[tag]["support"] == tags.count(tag)
