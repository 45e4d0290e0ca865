"""The scores that each task kind reports.

Entities are scored as by conlleval, tokens and labels as by scikit-learn with ``zero_division=0``. Averages are over
the labels that occur in the references or the predictions, as in scikit-learn. Answers that are spans of a text are
compared by answer_matching.py.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, product, starmap
from typing import Any, NamedTuple

import numpy as np

from sparse_ft.tasks.kinds.answer_matching import answer_f1, exact_match
from sparse_ft.tasks.schemes import Span, spans_from_tags

Report = dict[str, Any]
"""Label or average to ``{"precision", "recall", "f1-score", "support"}``; ``accuracy`` is a plain number."""


@dataclass(frozen=True)
class Confusion:
    """How often each reference label got each predicted label."""

    labels: list[str]
    """The labels that occur, in the order of rows and columns."""
    matrix: list[list[int]]
    """Counts; rows are references, columns predictions."""


@dataclass(frozen=True)
class Score:
    """All figures of one task on one set of rows."""

    n: int
    """Number of rows; sentences for tagging."""
    metrics: dict[str, float]
    """Figures by name, each 0 to 1."""
    report: Report
    """Figures per label, or per entity type for tagging; empty where a task has no labels."""
    token_report: Report | None = None
    """Figures per tag, including ``O``; only for tagging."""
    confusion: Confusion | None = None
    """Only for classification."""
    unseen_labels: list[str] = field(default_factory=list)
    """Labels (tags) of the references that do not occur in training; they count as errors."""
    out_of_scope: str | None = None
    """The label that means "none of the others", if the task has one."""


def score_classification(
    references: Sequence[str],
    predictions: Sequence[str],
    *,
    labels: Sequence[str],
    out_of_scope: str | None = None,
) -> Score:
    """Score one label per row.

    Args:
        references: The right label of each row; may hold labels that do not occur in training.
        predictions: The predicted label of each row.
        labels: Labels of the task; gives the order of the report.
        out_of_scope: The label that means "none of the others"; adds ``oos_precision``, ``oos_recall`` and
            ``in_scope_accuracy``, the accuracy over rows whose reference is another label.
    """
    _check_rows(references, predictions)
    names, codes = _encode(references, predictions, labels=labels)
    report = _label_report(names, codes)
    metrics = _label_metrics(report)
    if out_of_scope is not None:
        metrics |= _scope_metrics(references, predictions, out_of_scope=out_of_scope)
    return Score(
        n=len(references),
        metrics=metrics,
        report=report,
        confusion=_confusion(names, codes),
        unseen_labels=_unseen(references, labels),
        out_of_scope=out_of_scope,
    )


def score_multi_label(
    references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], *, labels: Sequence[str]
) -> Score:
    """Score any number of labels per row.

    Args:
        references: The right labels of each row, in any order; none is allowed.
        predictions: The predicted labels of each row.
        labels: Labels of the task; gives the order of the report.

    Returns:
        ``accuracy`` counts rows with exactly the right labels (subset accuracy). A row without labels on either side
        has ``samples_f1`` 0, as in scikit-learn.
    """
    _check_rows(references, predictions)
    rows, guesses = [set(row) for row in references], [set(row) for row in predictions]
    report = _counted_report(_count(rows, guesses), names=_occurring(chain(*rows), chain(*guesses), labels=labels))
    report["samples avg"] = _samples_figures(rows, guesses, support=report["micro avg"]["support"])
    metrics = {"accuracy": _share(row == guess for row, guess in zip(rows, guesses, strict=True))}
    for average in ("macro", "micro", "weighted", "samples"):
        metrics[f"{average}_f1"] = report[f"{average} avg"]["f1-score"]
    return Score(n=len(rows), metrics=metrics, report=report, unseen_labels=_unseen(chain(*rows), labels))


def score_tagging(
    references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], *, labels: Sequence[str]
) -> Score:
    """Score one IOB2 tag per word: entities as conlleval does, tags as scikit-learn does.

    Args:
        references: The right tags of each sentence.
        predictions: As many predicted tags, which may be ill-formed (``I-`` after ``O`` starts an entity).
        labels: Tags of the task; gives the order of the token report.

    Returns:
        ``f1``, ``precision``, ``recall`` (micro, over entities), ``macro_f1`` (over entity types) and, over tags
        including ``O``, ``token_accuracy`` and ``token_{macro,micro,weighted}_f1``; micro F1 equals the accuracy.
    """
    _check_rows(references, predictions)
    for row, (tags, guesses) in enumerate(zip(references, predictions, strict=True)):
        _check_rows(tags, guesses, where=f" in sentence {row + 1}")
    counts = _count(_entities(references), _entities(predictions))
    report = _counted_report(counts, names=sorted(counts.support | counts.predicted))
    words, guesses = list(chain.from_iterable(references)), list(chain.from_iterable(predictions))
    token_report = _label_report(*_encode(words, guesses, labels=labels))
    micro = report["micro avg"]
    metrics = {"f1": micro["f1-score"], "precision": micro["precision"], "recall": micro["recall"]}
    metrics["macro_f1"] = report["macro avg"]["f1-score"]
    metrics |= {f"token_{name}": value for name, value in _label_metrics(token_report).items()}
    unseen = _unseen(words, labels)
    return Score(n=len(references), metrics=metrics, report=report, token_report=token_report, unseen_labels=unseen)


def score_answers(references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Score:
    """Score one text per row by the most similar of the accepted answers.

    Args:
        references: The accepted answers of each row, at least one.
        predictions: The predicted answer of each row, alone in a list; of several answers the best counts.

    Returns:
        ``exact_match`` and ``answer_f1``, means over the rows.
    """
    _check_rows(references, predictions)
    pairs = [list(product(answers, guesses)) for answers, guesses in zip(references, predictions, strict=True)]
    f1 = [max(starmap(answer_f1, row)) for row in pairs]
    metrics = {
        "exact_match": _share(any(starmap(exact_match, row)) for row in pairs),
        "answer_f1": sum(f1) / len(f1) if f1 else 0.0,
    }
    return Score(n=len(references), metrics=metrics, report={})


def score_choices(references: Sequence[int], predictions: Sequence[int]) -> Score:
    """Compute the ``accuracy`` of the index of one choice per row."""
    _check_rows(references, predictions)
    right = (answer == guess for answer, guess in zip(references, predictions, strict=True))
    return Score(n=len(references), metrics={"accuracy": _share(right)}, report={})


def _check_rows(references: Sequence[Any], predictions: Sequence[Any], *, where: str = "") -> None:
    if len(references) != len(predictions):
        raise ValueError(
            f"Got {len(references)} references and {len(predictions)} predictions{where}. "
            "Expected one prediction for each reference; pass both in the same order."
        )


def _unseen(references: Iterable[str], labels: Sequence[str]) -> list[str]:
    return sorted(set(references) - set(labels))


def _occurring(references: Iterable[str], predictions: Iterable[str], *, labels: Sequence[str]) -> list[str]:
    """List the labels that occur, in the task's order, others at the end."""
    occurring = set(references) | set(predictions)
    known = [label for label in dict.fromkeys(labels) if label in occurring]
    return known + sorted(occurring - set(known))


def _encode(
    references: Sequence[str], predictions: Sequence[str], *, labels: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Encode the labels that occur as integers, because scikit-learn is slow on strings.

    Returns:
        Names by code, and codes of shape (2, rows): references, predictions.
    """
    names = _occurring(references, predictions, labels=labels)
    code_of = {name: code for code, name in enumerate(names)}
    codes = [[code_of[label] for label in column] for column in (references, predictions)]
    return names, np.array(codes, dtype=np.int64)


def _label_report(names: Sequence[str], codes: np.ndarray) -> Report:
    """Compute scikit-learn's report for one label a row; ``codes`` as from `_encode`."""
    from sklearn.metrics import classification_report  # takes seconds to import, and prediction does not need it

    if not names:
        return {"accuracy": 0.0, "macro avg": _figures(0, 0, 0), "weighted avg": _figures(0, 0, 0)}
    with warnings.catch_warnings():
        # With many labels on few rows scikit-learn suspects a regression.
        warnings.filterwarnings("ignore", message="The number of unique classes", category=UserWarning)
        report = classification_report(
            codes[0], codes[1], target_names=[str(name) for name in names], output_dict=True, zero_division=0
        )
    for row in report.values():
        if isinstance(row, dict):
            row["support"] = int(row["support"])
    return dict(report)


def _label_metrics(report: Report) -> dict[str, float]:
    """Pick the metrics; with one label per row the micro average is the accuracy."""
    return {
        "accuracy": report["accuracy"],
        "macro_f1": report["macro avg"]["f1-score"],
        "micro_f1": report["accuracy"],
        "weighted_f1": report["weighted avg"]["f1-score"],
    }


def _scope_metrics(references: Sequence[str], predictions: Sequence[str], *, out_of_scope: str) -> dict[str, float]:
    pairs = list(zip(references, predictions, strict=True))
    right_outside = sum(right == guess == out_of_scope for right, guess in pairs)
    outside = _figures(right_outside, list(predictions).count(out_of_scope), list(references).count(out_of_scope))
    return {
        "oos_precision": outside["precision"],
        "oos_recall": outside["recall"],
        "in_scope_accuracy": _share(right == guess for right, guess in pairs if right != out_of_scope),
    }


def _confusion(names: list[str], codes: np.ndarray) -> Confusion:
    size = len(names)
    counts = np.bincount(codes[0] * size + codes[1], minlength=size * size)
    return Confusion(labels=names, matrix=counts.reshape(size, size).tolist())


def _share(outcomes: Iterable[bool]) -> float:
    """Compute the share of true outcomes; 0 without outcomes."""
    listed = list(outcomes)
    return sum(listed) / len(listed) if listed else 0.0


class _Counts(NamedTuple):
    """Number of labels (entities) by name."""

    support: Counter[str]
    predicted: Counter[str]
    right: Counter[str]


def _entities(sentences: Sequence[Sequence[str]]) -> Iterator[set[Span]]:
    return (set(spans_from_tags(tags)) for tags in sentences)


def _count(references: Iterable[set[Any]], predictions: Iterable[set[Any]]) -> _Counts:
    """Count labels, or spans by their type, in two series of sets."""
    counts = _Counts(Counter(), Counter(), Counter())
    for right, guessed in zip(references, predictions, strict=True):
        for counter, items in zip(counts, (right, guessed, right & guessed), strict=True):
            counter.update(item.type if isinstance(item, Span) else item for item in items)
    return counts


def _figures(right: int, predicted: int, support: int) -> dict[str, float]:
    """Compute a report row from counts; undefined figures are 0."""
    precision = right / predicted if predicted else 0.0
    recall = right / support if support else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1-score": f1, "support": support}


def _counted_report(counts: _Counts, *, names: Sequence[str]) -> Report:
    """Compute a report in the layout of scikit-learn and seqeval, with 0 in place of NaN."""
    rows = [_figures(counts.right[name], counts.predicted[name], counts.support[name]) for name in names]
    support = counts.support.total()
    return {
        **{str(name): row for name, row in zip(names, rows, strict=True)},
        "micro avg": _figures(counts.right.total(), counts.predicted.total(), support),
        "macro avg": _mean_figures(rows, weights=[1] * len(rows), support=support),
        "weighted avg": _mean_figures(rows, weights=[counts.support[name] for name in names], support=support),
    }


def _samples_figures(rows: Sequence[set[str]], guesses: Sequence[set[str]], *, support: int) -> dict[str, float]:
    """Average the figures of each row over the rows."""
    figures = [_figures(len(row & guess), len(guess), len(row)) for row, guess in zip(rows, guesses, strict=True)]
    return _mean_figures(figures, weights=[1] * len(figures), support=support)


def _mean_figures(rows: Sequence[dict[str, float]], *, weights: Sequence[int], support: int) -> dict[str, float]:
    keys = ("precision", "recall", "f1-score")
    if not sum(weights):
        return {**dict.fromkeys(keys, 0.0), "support": support}
    return {**{key: float(np.average([row[key] for row in rows], weights=weights)) for key in keys}, "support": support}
