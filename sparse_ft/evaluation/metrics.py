"""The METRICS table: `evaluate.Metric` classes that need no network, and metrics by name."""

import inspect
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.tasks.kinds.scores import Score, score_answers, score_classification, score_multi_label, score_tagging

_LABELS = [Features({"predictions": Value(kind), "references": Value(kind)}) for kind in ("string", "int64")]
_LABEL_LISTS = [
    Features({"predictions": ListOf(Value(kind)), "references": ListOf(Value(kind))}) for kind in ("string", "int64")
]


class _MemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` that writes no file; the figure is named as the class, in snake case."""

    columns: ClassVar[list[Features]]

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        """Make no folder: evaluate creates one in the home directory even when rows are kept in memory."""
        return ""

    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> Features:
        """Accept a batch without rows, in which evaluate looks for a first one."""
        if not any(len(column) for column in batch.values()):
            return self.columns[0]
        return super()._infer_feature_from_batch(batch)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=inspect.getdoc(self) or "", citation="", features=self.columns)


class _LabelMetric(_MemoryMetric):
    """A figure over labels, one or a list a row, as text or numbers."""

    columns = _LABELS + _LABEL_LISTS

    def _compute(self, *, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        lists = bool(references) and isinstance(references[0], list)
        score = (score_multi_label if lists else score_classification)(references, predictions, labels=[])
        return {self.name: score.metrics[self.name]}


class _TagMetric(_MemoryMetric):
    """A figure over sentences of IOB2 tags."""

    columns = _LABEL_LISTS[:1]

    def _compute(self, *, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        score = score_tagging(references, predictions, labels=[])
        return {self.name: score.metrics[self.name]}


class Accuracy(_LabelMetric):
    """Share of rows with the right label; with label lists, of rows whose labels are all right."""


class MacroF1(_LabelMetric):
    """Unweighted mean of the labels' F1."""


class MicroF1(_LabelMetric):
    """F1 over all labels of all rows together."""


class WeightedF1(_LabelMetric):
    """Mean of the labels' F1, weighted by how often each occurs in the references."""


class SamplesF1(_LabelMetric):
    """Mean of the rows' F1; label lists only."""

    columns = _LABEL_LISTS

    def _compute(self, *, predictions: list[list[Any]], references: list[list[Any]]) -> dict[str, float]:
        return {self.name: score_multi_label(references, predictions, labels=[]).metrics[self.name]}


class F1(_TagMetric):
    """F1 over entities, as conlleval computes it."""


class Precision(_TagMetric):
    """Share of the predicted entities that are right in type and both ends."""


class Recall(_TagMetric):
    """Share of the reference entities that were found."""


class TokenAccuracy(_TagMetric):
    """Share of words with the right tag, ``O`` included."""


class TokenMacroF1(_TagMetric):
    """Unweighted mean of the tags' F1, ``O`` included."""


class TokenMicroF1(_TagMetric):
    """F1 over all words together, ``O`` included; equals the token accuracy."""


class TokenWeightedF1(_TagMetric):
    """Mean of the tags' F1, weighted by how often each occurs in the references, ``O`` included."""


class _AnswerMetric(_MemoryMetric):
    """A figure over answers: a list of one text a row, and a list of those that are right."""

    columns = _LABEL_LISTS[:1]

    def _compute(self, *, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        return {self.name: score_answers(references, predictions).metrics[self.name]}


class ExactMatch(_AnswerMetric):
    """Share of answers that are right but for case and punctuation, as CMRC 2018 counts them."""


class AnswerF1(_AnswerMetric):
    """Mean of the answers' F1 over characters and words, as CMRC 2018 counts it."""


METRICS: dict[str, type[_MemoryMetric]] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "micro_f1": MicroF1,
    "weighted_f1": WeightedF1,
    "samples_f1": SamplesF1,
    "f1": F1,
    "precision": Precision,
    "recall": Recall,
    "token_accuracy": TokenAccuracy,
    "token_macro_f1": TokenMacroF1,
    "token_micro_f1": TokenMicroF1,
    "token_weighted_f1": TokenWeightedF1,
    "exact_match": ExactMatch,
    "answer_f1": AnswerF1,
}
_EXTERNAL = "evaluate:"


def load_metric(name: str) -> evaluate.Metric:
    """Make a metric by name.

    Args:
        name: A key of METRICS, or ``evaluate:<id>`` with the id of a metric on the Hugging Face hub or the path of a
            local folder that holds a script of the same name; a trailing ``#key`` is for `headline`.

    Raises:
        ConfigError: If there is no such metric, or it cannot be loaded.
    """
    if name in METRICS:
        return METRICS[name]()
    identifier = name.removeprefix(_EXTERNAL).partition("#")[0]
    if not name.startswith(_EXTERNAL) or not identifier:
        raise ConfigError(unknown_name("metric", name, [*METRICS, f"{_EXTERNAL}<id>"]))
    try:
        return evaluate.load(identifier, module_type="metric", keep_in_memory=True)
    except Exception as error:  # the script is foreign code and may raise anything
        raise ConfigError(
            f"Metric {name!r} could not be loaded: {_one_line(error)} Expected the id of a metric on the Hugging Face "
            f"hub, which needs the network, or the path of a local folder with its script. Check {identifier!r}, go "
            f"online, or use one of {', '.join(METRICS)}."
        ) from error


def headline(
    name: str, *, references: Sequence[Any], predictions: Sequence[Any], score: Score, labels: Sequence[str]
) -> float:
    """Give the figure that decides early stopping: one of the score's, or that of an ``evaluate:<id>`` metric.

    Args:
        name: The task's ``metric``; ``evaluate:<id>#<key>`` picks one figure of a metric that computes several.
        references: What the score was computed from.
        predictions: What the score was computed from.
        score: The figures the task kind computed.
        labels: Labels of the task; their order gives the numbers for a metric that wants numbers.

    Raises:
        ConfigError: If the metric does not fit the task, cannot be computed, or gives several figures of which none is
            picked.
    """
    if name in score.metrics:
        return score.metrics[name]
    if not name.startswith(_EXTERNAL):
        advice = f" To use any other metric of the evaluate library, write {_EXTERNAL}<id>."
        raise ConfigError(unknown_name("metric of this task", name, score.metrics) + advice)
    metric = load_metric(name)
    code_of = {label: code for code, label in enumerate(labels)} if _wants_numbers(metric) else None
    try:
        figures = metric.compute(references=_as_codes(references, code_of), predictions=_as_codes(predictions, code_of))
    except Exception as error:  # foreign code, as above
        raise ConfigError(
            f"Metric {name!r} could not be computed: {_one_line(error)} It got one entry a row, such as "
            f"{references[:1]!r}. Use a metric that fits the task, for example {next(iter(score.metrics))!r}."
        ) from error
    return _pick(figures, name=name)


def _pick(figures: Any, *, name: str) -> float:
    """Pick the one number out of what an evaluate metric returned."""
    identifier, _, key = name.removeprefix(_EXTERNAL).partition("#")
    single = {entry: float(value) for entry, value in (figures or {}).items() if isinstance(value, numbers.Real)}
    if not key:
        key = identifier.rstrip("/").rpartition("/")[2] if len(single) != 1 else next(iter(single))
    if key not in single:
        raise ConfigError(
            f"Metric {name!r} gave no single figure {key!r}; it gave {', '.join(single) or 'no number'}. "
            f"Write {_EXTERNAL}{identifier}#<key> with one of them."
        )
    return single[key]


def _wants_numbers(metric: evaluate.Metric) -> bool:
    """Tell whether a metric takes label numbers only, as most of the hub's do."""
    options = metric.features if isinstance(metric.features, list) else [metric.features]
    return not any(_leaf_type(option["references"]) == "string" for option in options)


def _leaf_type(feature: Any) -> str:
    while not isinstance(feature, Value):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature.dtype


def _as_codes(values: Any, code_of: dict[str, int] | None) -> Any:
    """Replace labels by numbers, in lists of any depth; a label outside the task's gets the next number."""
    if code_of is None:
        return values
    if isinstance(values, str):
        return code_of.setdefault(values, len(code_of))
    if isinstance(values, Sequence):
        return [_as_codes(value, code_of) for value in values]
    return values


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
