"""The figures of every kind of task against seqeval, scikit-learn and conlleval."""

import random
import sys
from itertools import chain
from pathlib import Path

import evaluate
import numpy as np
import pytest
import seqeval.metrics
from sklearn import metrics as sklearn_metrics
from sklearn.preprocessing import MultiLabelBinarizer

from sparse_ft.errors import ConfigError
from sparse_ft.evaluation.external_metrics import headline
from sparse_ft.tasks.kinds.scores import score_classification, score_multi_label, score_tagging
from sparse_ft.tasks.spec import TaskSpec

TYPES = ["PER", "LOC", "ORG-NOM"]
TAGS = ["O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI")]


def iob2_sentence(rng):
    tags = []
    while len(tags) < rng.randint(0, 12):
        name = rng.choice(TYPES)
        tags += rng.choice([["O"], [f"B-{name}"] + [f"I-{name}"] * rng.randint(0, 3)])
    return tags


def iob1_sentence(rng):
    """I- begins an entity, B- only where it touches one of the same type."""
    tags, last = [], None
    for _ in range(rng.randint(0, 6)):
        name = rng.choice([*TYPES, None, None])
        if name is None:
            tags.append("O")
        else:
            tags += [f"{'B' if name == last else 'I'}-{name}"] + [f"I-{name}"] * rng.randint(0, 2)
        last = name
    return tags


def any_sentence(rng):
    return [rng.choice(TAGS) for _ in range(rng.randint(0, 12))]


def disturbed(tags, rng, share):
    return [rng.choice(TAGS) if rng.random() < share else tag for tag in tags]


def tagged(make_sentence, seed, num_sentences=1000):
    rng = random.Random(seed)
    references = [make_sentence(rng) for _ in range(num_sentences)]
    return references, [disturbed(tags, rng, 0.3) for tags in references]


def conlleval(references, predictions):
    """Transcribe conlleval.pl: walk over both columns at once, with its tables of chunk starts and ends."""

    def ends(prior, tag, prior_type, name):
        table = prior + tag in {"BB", "BO", "IB", "IO"}
        return table or (prior != "O" and prior_type != name)

    def starts(prior, tag, prior_type, name):
        table = tag == "B" or prior + tag == "OI"
        return table or (tag != "O" and prior_type != name)

    right = support = predicted = 0
    for tags, guesses in zip(references, predictions, strict=True):
        in_correct = False
        last, last_guess = ("O", ""), ("O", "")
        for tag, guess in zip([*tags, "O"], [*guesses, "O"], strict=True):
            now, now_guess = (tag[0], tag[2:]), (guess[0], guess[2:])
            end = ends(last[0], now[0], last[1], now[1])
            end_guess = ends(last_guess[0], now_guess[0], last_guess[1], now_guess[1])
            if in_correct:
                if end and end_guess and last[1] == last_guess[1]:
                    in_correct = False
                    right += 1
                elif end != end_guess or now[1] != now_guess[1]:
                    in_correct = False
            start = starts(last[0], now[0], last[1], now[1])
            start_guess = starts(last_guess[0], now_guess[0], last_guess[1], now_guess[1])
            if start and start_guess and now[1] == now_guess[1]:
                in_correct = True
            support += start
            predicted += start_guess
            last, last_guess = now, now_guess
    precision, recall = right / predicted, right / support
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


def assert_reports_equal(report, expected):
    assert report.keys() == expected.keys()
    for name, figures in expected.items():
        assert report[name] == pytest.approx(figures, abs=1e-12), name


@pytest.mark.parametrize("make_sentence", [iob2_sentence, iob1_sentence, any_sentence])
@pytest.mark.parametrize("seed", [0, 1])
def test_entity_figures_equal_seqeval_and_conlleval(make_sentence, seed):
    references, predictions = tagged(make_sentence, seed)
    score = score_tagging(references, predictions, labels=TAGS)
    entity_metrics = {name: score.metrics[name] for name in ("f1", "precision", "recall")}
    assert entity_metrics == pytest.approx(
        {
            "f1": seqeval.metrics.f1_score(references, predictions),
            "precision": seqeval.metrics.precision_score(references, predictions),
            "recall": seqeval.metrics.recall_score(references, predictions),
        },
        abs=1e-12,
    )
    assert entity_metrics == pytest.approx(conlleval(references, predictions), abs=1e-12)
    assert_reports_equal(score.report, seqeval.metrics.classification_report(references, predictions, output_dict=True))
    assert score.metrics["macro_f1"] == score.report["macro avg"]["f1-score"]
    assert score.n == len(references)


@pytest.mark.parametrize("seed", range(5))
def test_entity_report_of_few_sentences_equals_seqeval(seed):
    rng = random.Random(seed)
    references = [["B-PER"], *(any_sentence(rng) for _ in range(2))]
    predictions = [[rng.choice(TAGS) for _ in tags] for tags in references]
    expected = seqeval.metrics.classification_report(references, predictions, output_dict=True, zero_division=0)
    assert_reports_equal(score_tagging(references, predictions, labels=TAGS).report, expected)


def test_token_figures_equal_scikit_learn():
    references, predictions = tagged(iob2_sentence, seed=3)
    score = score_tagging(references, predictions, labels=TAGS)
    words, guesses = list(chain(*references)), list(chain(*predictions))
    expected = sklearn_metrics.classification_report(words, guesses, output_dict=True, zero_division=0)
    assert_reports_equal(score.token_report, expected)
    assert score.metrics["token_accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(words, guesses))
    for average in ("macro", "micro", "weighted"):
        f1 = sklearn_metrics.f1_score(words, guesses, average=average)
        assert score.metrics[f"token_{average}_f1"] == pytest.approx(f1)
    assert list(score.token_report)[: len(TAGS)] == TAGS


def test_tagging_without_any_entity_scores_zero():
    score = score_tagging([["O", "O"], []], [["O", "O"], []], labels=["O"])
    assert (score.metrics["f1"], score.metrics["macro_f1"], score.metrics["token_accuracy"]) == (0.0, 0.0, 1.0)
    assert score.report["weighted avg"] == {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 0}


def test_tagging_names_tags_unseen_in_training():
    score = score_tagging([["B-FAC", "I-FAC"]], [["O", "O"]], labels=["O", "B-PER", "I-PER"])
    assert score.unseen_labels == ["B-FAC", "I-FAC"]
    assert score.token_report["B-FAC"]["support"] == 1


def test_tagging_refuses_sentences_of_different_length():
    with pytest.raises(ValueError, match="2 references and 1 predictions in sentence 2"):
        score_tagging([["O"], ["O", "O"]], [["O"], ["O"]], labels=["O"])


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("num_labels", [1, 2, 5, 150])
def test_classification_figures_equal_scikit_learn(num_labels):
    rng = random.Random(num_labels)
    labels = [f"label {number}" for number in range(num_labels)]
    references = [rng.choice(labels) for _ in range(500)]
    predictions = [label if rng.random() < 0.7 else rng.choice(labels) for label in references]
    score = score_classification(references, predictions, labels=labels[::-1])
    expected = sklearn_metrics.classification_report(references, predictions, output_dict=True, zero_division=0)
    assert_reports_equal(score.report, expected)
    assert score.metrics["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(references, predictions))
    for average in ("macro", "micro", "weighted"):
        f1 = sklearn_metrics.f1_score(references, predictions, average=average, zero_division=0)
        assert score.metrics[f"{average}_f1"] == pytest.approx(f1)
    matrix = sklearn_metrics.confusion_matrix(references, predictions, labels=score.confusion.labels)
    assert score.confusion.matrix == matrix.tolist()
    assert score.confusion.labels == [label for label in labels[::-1] if label in expected]


def test_out_of_scope_by_hand():
    references = ["a", "a", "b", "oos", "oos", "oos", "b", "a"]
    predictions = ["a", "b", "b", "oos", "oos", "a", "oos", "a"]
    metrics = score_classification(references, predictions, labels=["a", "b", "oos"], out_of_scope="oos").metrics
    assert metrics["oos_precision"] == pytest.approx(2 / 3)
    assert metrics["oos_recall"] == pytest.approx(2 / 3)
    assert metrics["in_scope_accuracy"] == pytest.approx(3 / 5)
    assert metrics["accuracy"] == pytest.approx(5 / 8)


def test_label_unseen_in_training_counts_as_error_and_is_named():
    score = score_classification(["a", "b", "new"], ["a", "b", "a"], labels=["b", "a"])
    assert score.unseen_labels == ["new"]
    assert score.metrics["accuracy"] == pytest.approx(2 / 3)
    assert score.report["new"] == {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 1}
    assert score.confusion.labels == ["b", "a", "new"]


@pytest.mark.parametrize("score", [score_classification, score_multi_label, score_tagging])
def test_no_rows_score_zero(score):
    result = score([], [], labels=["a"])
    assert result.n == 0
    assert set(result.metrics.values()) == {0.0}


def test_classification_refuses_missing_predictions():
    with pytest.raises(ValueError, match="2 references and 1 predictions"):
        score_classification(["a", "b"], ["a"], labels=["a", "b"])


@pytest.mark.parametrize("num_labels", [2, 6])
def test_multi_label_figures_equal_scikit_learn(num_labels):
    rng = random.Random(num_labels)
    labels = [f"label {number}" for number in range(num_labels)]
    references = [rng.sample(labels, rng.randint(0, num_labels)) for _ in range(300)]
    predictions = [rng.sample(labels, rng.randint(0, num_labels)) for _ in references]
    score = score_multi_label(references, predictions, labels=labels)
    indicator = MultiLabelBinarizer().fit([labels])
    right, given = indicator.transform(references), indicator.transform(predictions)
    expected = sklearn_metrics.classification_report(
        right, given, target_names=labels, output_dict=True, zero_division=0
    )
    assert_reports_equal(score.report, expected)
    assert score.metrics["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(right, given))
    for average in ("macro", "micro", "weighted", "samples"):
        f1 = sklearn_metrics.f1_score(right, given, average=average, zero_division=0)
        assert score.metrics[f"{average}_f1"] == pytest.approx(f1)


def test_multi_label_rows_without_labels():
    score = score_multi_label([[], ["new"], ["a", "a"]], [[], [], ["a"]], labels=["a"])
    assert score.metrics["accuracy"] == pytest.approx(2 / 3)
    assert score.unseen_labels == ["new"]


def test_metric_that_cannot_be_loaded_is_named(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(evaluate, "load", offline)
    with pytest.raises(ConfigError, match=r"'evaluate:rouge' could not be loaded: Couldn't reach the hub\..*network"):
        headline_of("evaluate:rouge")


SCRIPT = """
import datasets
import evaluate

class LocalMetric(evaluate.Metric):
    def _info(self):
        value = datasets.Value({dtype!r})
        features = datasets.Features({{"predictions": value, "references": value}})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        right = sum(a == b for a, b in zip(predictions, references))
        return {result}
"""


@pytest.fixture
def local_metric(tmp_path, monkeypatch):
    """Write a metric script in its own folder; evaluate's copy of it, which it imports, is kept in tmp_path too."""
    monkeypatch.setattr(evaluate.loading, "init_hf_modules", lambda _=None: str(tmp_path / "modules"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for module in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, module)

    def write(name, *, result, dtype="string"):
        folder = Path(tmp_path) / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(SCRIPT.format(dtype=dtype, result=result), encoding="utf-8")
        return f"evaluate:{folder}"

    return write


def headline_of(name, references=("b", "a", "new"), predictions=("b", "b", "a")):
    score = score_classification(references, predictions, labels=["a", "b"])
    spec = TaskSpec(name="mood", kind="classification", metric=name)
    return headline(spec, references=references, predictions=predictions, score=score, labels=["a", "b"])


def test_a_metric_that_cannot_be_computed_is_refused(local_metric, tmp_path):
    for name, message in [
        ("f1", r"Unknown metric of this task 'f1'.*Known: accuracy, macro_f1.*evaluate:<id>"),
        ("acuracy", r"Unknown metric of this task 'acuracy'\. Did you mean 'accuracy'\?"),
        (local_metric("failing", result="{'right': 1 / 0}"), "could not be computed: division by zero"),
        (f"evaluate:{tmp_path / 'nothing'}", "local folder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            headline_of(name)


def test_headline_of_a_local_metric(local_metric):
    assert headline_of("accuracy") == pytest.approx(1 / 3)
    assert headline_of(local_metric("right_rows", result="{'right': right}")) == 1.0


def test_headline_numbers_the_labels_for_a_metric_that_wants_numbers(local_metric):
    name = local_metric("label_codes", dtype="int32", result="{'total': sum(references) + 10 * sum(predictions)}")
    assert headline_of(name) == 1 + 0 + 2 + 10 * (1 + 1 + 0)


def test_headline_picks_one_of_several_figures(local_metric):
    name = local_metric("several", result="{'right': right, 'rows': len(references), 'names': []}")
    assert headline_of(f"{name}#rows") == 3.0
    with pytest.raises(ConfigError, match=r"gave no single figure 'several'; it gave right, rows\. Write evaluate:"):
        headline_of(name)


def test_scores_are_plain_numbers():
    score = score_classification(["a", "b"], ["a", "a"], labels=["a", "b"])
    assert not any(isinstance(value, np.generic) for value in score.metrics.values())
    assert type(score.report["a"]["support"]) is int
    assert type(score.report["accuracy"]) is float
