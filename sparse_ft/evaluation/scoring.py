"""Predict the rows of a task and score the predictions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ft.backbone.words import join_words
from sparse_ft.evaluation.external_metrics import headline
from sparse_ft.experts.inference import EncodedTexts, row_logits
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.ensembles import Ensemble, ensemble_logits, equal_routing
from sparse_ft.prediction.requests import joined
from sparse_ft.prediction.routes import Route
from sparse_ft.tasks.encoded_rows import EncodedRows
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.scores import Score
from sparse_ft.tasks.spec import TaskSpec


class RoutedPredictions(NamedTuple):
    """Predictions of the rows of a task, and the routing that led to them."""

    rows: list[Any]
    """One prediction a row, in the form that the kind of the task scores."""
    routing: Routing
    """Of each row if the route decides once a text, otherwise of each example."""
    usage: Tensor | None = None
    """[examples, blocks, experts]: mean weights over the tokens if a gate decided at every block, else None."""
    blocks: Sequence[int] = ()
    """The blocks of ``usage``."""


def predict_rows(model: SparseExpertModel, spec: TaskSpec, data: EncodedRows) -> list[Any]:
    """Predict every row of a task by the experts of the task, in the form that its kind scores."""
    return predict_by_route(model, spec, data, route=Route("task", model)).rows


def predict_by_route(model: SparseExpertModel, spec: TaskSpec, data: EncodedRows, *, route: Route) -> RoutedPredictions:
    """Predict every row of a task by the experts that a route chooses.

    Args:
        model: In evaluation mode.
        spec: One of its tasks.
        data: The rows.
        route: Chooses the experts of the rows; the head is always that of the task.
    """
    gate = route.block_gate(spec.name)
    if gate is not None:
        blocks = model.gated_blocks(gate)
        usage = torch.zeros(len(data.examples), len(blocks), len(model.experts.names))
        logits = row_logits(
            model,
            spec.name,
            data.examples,
            num_rows=data.num_rows,
            num_parts=data.num_parts,
            gate=gate,
            usage=usage,
            title=f"scoring {spec.name}",
        )
        return RoutedPredictions(_predictions(spec, data, logits), Routing(None, usage.mean(1)), usage, blocks)
    routing = _route_rows(spec, data, route)
    own = routing
    if route.once_a_text:
        own = route.serving(routing, spec.name).take([example.row for example in data.examples])
        routing = route.serving(routing, spec.name, likely=False)
    logits = row_logits(
        model,
        spec.name,
        data.examples,
        num_rows=data.num_rows,
        num_parts=data.num_parts,
        routing=own,
        title=f"scoring {spec.name}",
    )
    return RoutedPredictions(_predictions(spec, data, logits), routing)


def predict_by_ensemble(
    model: SparseExpertModel, specs: Mapping[str, TaskSpec], spec: TaskSpec, data: EncodedRows, *, ensemble: Ensemble
) -> RoutedPredictions:
    """Predict every row of a task by several experts together; ``specs`` are all tasks of the model."""
    encoded = EncodedTexts(data.examples, data.num_rows, data.num_parts)
    logits = ensemble_logits(model, specs, ensemble, encoded)
    routing = equal_routing(model, ensemble.experts, number=len(data.examples))
    return RoutedPredictions(_predictions(spec, data, logits), routing)


def _route_rows(spec: TaskSpec, data: EncodedRows, route: Route) -> Routing:
    """Route the rows of a task as ``predict`` would; the text and language of a row serve rules."""
    if route.once_a_text:
        return route.rows(data.row_examples, title=f"routing {spec.name}")
    if route.chooser is None:
        return route.rows(data.examples, task=spec.name, title=f"routing {spec.name}")
    stated = spec.language != "en"  # English is also the language of task files that state none
    metadata = [{"language": spec.language}] * data.num_rows if stated else []
    return route.rows(data.examples, texts=_texts(data), metadata=metadata)


def _texts(data: EncodedRows) -> list[str]:
    """Return the text of each row, as prediction shows it to rules."""
    if "text" not in data.columns:
        return [join_words(tokens) for tokens in data.columns["tokens"]]
    seconds = data.columns.get("text_pair", [None] * data.num_rows)
    return [joined(*pair) for pair in zip(data.columns["text"], seconds, strict=True)]


def _predictions(spec: TaskSpec, data: EncodedRows, logits: list[Tensor]) -> list[Any]:
    return find_kind(spec.kind).predictions(logits, columns=data.columns, labels=spec.label_names or [])


def score_rows(
    spec: TaskSpec, data: EncodedRows, predictions: Sequence[Any], *, rows: Sequence[int] | None = None
) -> Score:
    """Score predictions, of all rows or of those with some indices."""
    kind = find_kind(spec.kind)
    references = data.columns[kind.answer_column]
    indices = range(data.num_rows) if rows is None else rows
    right, predicted = [references[index] for index in indices], [predictions[index] for index in indices]
    score = kind.score(right, predicted, labels=spec.label_names or [], out_of_scope=spec.out_of_scope)
    if spec.metric not in score.metrics:
        labels = kind.outputs(spec.label_names or [])
        score.metrics[spec.metric] = headline(spec, references=right, predictions=predicted, score=score, labels=labels)
    return score
