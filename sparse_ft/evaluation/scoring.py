"""Predict rows of a task and score the predictions."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparse_ft.evaluation.metrics import headline
from sparse_ft.experts.gates import Gate
from sparse_ft.experts.inference import row_logits
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.tasks.encoded_rows import EncodedRows
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.scores import Score
from sparse_ft.tasks.spec import TaskSpec


def predict_rows(
    model: SparseExpertModel,
    spec: TaskSpec,
    data: EncodedRows,
    *,
    routing: Routing | None = None,
    gate: Gate | None = None,
    usage: Tensor | None = None,
) -> list[Any]:
    """Predict every row of a task, in the form that its kind scores.

    Args:
        model: In evaluation mode.
        spec: One of its tasks.
        data: The rows.
        routing: Of ``data.examples``; None takes the task's expert.
        gate: Asked at every block in place of ``routing``.
        usage: [examples, blocks, experts], filled with the mean weights that ``gate`` gave.
    """
    logits = row_logits(
        model,
        spec.name,
        data.examples,
        num_rows=data.num_rows,
        num_parts=data.num_parts,
        routing=routing,
        gate=gate,
        usage=usage,
    )
    return find_kind(spec.kind).predictions(logits, columns=data.columns, labels=spec.label_names or [])


def score_rows(
    spec: TaskSpec, data: EncodedRows, predictions: Sequence[Any], *, rows: Sequence[int] | None = None
) -> Score:
    """Score predictions, on all rows or on some places."""
    kind = find_kind(spec.kind)
    references = data.columns[kind.answer_column]
    places = range(data.num_rows) if rows is None else rows
    chosen, guessed = [references[place] for place in places], [predictions[place] for place in places]
    score = kind.score(chosen, guessed, labels=spec.label_names or [], out_of_scope=spec.out_of_scope)
    if spec.metric not in score.metrics:
        labels = kind.outputs(spec.label_names or [])
        score.metrics[spec.metric] = headline(
            spec.metric, references=chosen, predictions=guessed, score=score, labels=labels
        )
    return score
