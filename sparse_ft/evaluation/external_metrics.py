"""Metrics of the `evaluate` library for tasks that ask for one, as ``metric: evaluate:<id>``."""

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import Value

from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.tasks.kinds.scores import Score
from sparse_ft.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from evaluate import Metric

_PREFIX = "evaluate:"


def check_metric(spec: TaskSpec) -> None:
    """Refuse the metric of a checkpoint's task if it is code.

    Raises:
        ConfigError: If the metric is an ``evaluate:<id>``, and the user does not trust the task file.
    """
    if spec.foreign and spec.metric.startswith(_PREFIX):
        raise ConfigError(
            f"Task {spec.name!r} of the checkpoint is scored by {spec.metric!r}, which runs the code of that metric. "
            "If you trust whoever made the checkpoint, add --trust-tasks (in Python trust_tasks=True)."
        )


def headline(
    spec: TaskSpec, *, references: Sequence[Any], predictions: Sequence[Any], score: Score, labels: Sequence[str]
) -> float:
    """Return the figure that decides early stopping: one of the score, or that of an ``evaluate:<id>`` metric.

    Args:
        spec: The task; as ``metric``, ``evaluate:<id>#<key>`` picks one figure of a metric that computes several.
        references: The right answer of each row.
        predictions: The predicted answer of each row.
        score: The figures that the task kind computed from them.
        labels: Labels of the task; a metric that reads numbers gets the index of each label.

    Raises:
        ConfigError: If the metric does not fit the task, cannot be computed, gives several figures of which none is
            picked, or is code that a checkpoint names.
    """
    name = spec.metric
    if name in score.metrics:
        return score.metrics[name]
    if not name.removeprefix(_PREFIX).partition("#")[0] or not name.startswith(_PREFIX):
        advice = f" To use any other metric of the evaluate library, write {_PREFIX}<id>."
        raise ConfigError(unknown_name("metric of this task", name, score.metrics) + advice)
    check_metric(spec)
    metric = _load(name, known=list(score.metrics))
    code_of = {label: code for code, label in enumerate(labels)} if _wants_numbers(metric) else None
    try:
        figures = metric.compute(references=_as_codes(references, code_of), predictions=_as_codes(predictions, code_of))
    except Exception as error:  # the script is foreign code and may raise anything
        raise ConfigError(
            f"Metric {name!r} could not be computed: {_one_line(error)} It got one entry a row, such as "
            f"{references[:1]!r}. Use a metric that fits the task, for example {next(iter(score.metrics))!r}."
        ) from error
    return _pick(figures, name=name)


def _load(name: str, *, known: Sequence[str]) -> "Metric":
    """Load a metric by the id of one on the Hugging Face hub, or the path of a local folder with its script."""
    import evaluate

    identifier = name.removeprefix(_PREFIX).partition("#")[0]
    try:
        return evaluate.load(identifier, module_type="metric", keep_in_memory=True)
    except Exception as error:  # the script is foreign code and may raise anything
        raise ConfigError(
            f"Metric {name!r} could not be loaded: {_one_line(error)} Expected the id of a metric on the Hugging Face "
            f"hub, which needs the network, or the path of a local folder with its script. Check {identifier!r}, go "
            f"online, or use one of {', '.join(known)}."
        ) from error


def _pick(figures: Any, *, name: str) -> float:
    """Pick one number of the figures that a metric returned."""
    identifier, _, key = name.removeprefix(_PREFIX).partition("#")
    single = {entry: float(value) for entry, value in (figures or {}).items() if isinstance(value, numbers.Real)}
    if not key:
        key = identifier.rstrip("/").rpartition("/")[2] if len(single) != 1 else next(iter(single))
    if key not in single:
        raise ConfigError(
            f"Metric {name!r} gave no single figure {key!r}; it gave {', '.join(single) or 'no number'}. "
            f"Write {_PREFIX}{identifier}#<key> with one of them."
        )
    return single[key]


def _wants_numbers(metric: "Metric") -> bool:
    """Whether a metric reads numbers in place of labels, as most on the hub do."""
    options = metric.features if isinstance(metric.features, list) else [metric.features]
    return not any(_leaf_type(option["references"]) == "string" for option in options)


def _leaf_type(feature: Any) -> str:
    while not isinstance(feature, Value):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature.dtype


def _as_codes(values: Any, code_of: dict[str, int] | None) -> Any:
    """Replace labels by their index, in lists of any depth; a label that the task lacks gets the next number."""
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
