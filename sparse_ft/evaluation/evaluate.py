"""Score a checkpoint's tasks on data: what the task kind counts, and again without the rows known from training."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.words import join_words
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint
from sparse_ft.errors import ConfigError, DataError, unknown_name
from sparse_ft.evaluation.routing_report import RoutingReport, report_routing
from sparse_ft.evaluation.score_report import TaskReport, report_json, report_text
from sparse_ft.evaluation.scoring import predict_rows, score_rows
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.ensembles import Ensemble, ensemble_logits, equal_routing, find_ensembles
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.prediction.routes import Route
from sparse_ft.prediction.rules import joined
from sparse_ft.tasks.encoded_rows import EncodedRows, encode_rows
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import read, rows_seen_in_train
from sparse_ft.tasks.sources import name_sources
from sparse_ft.tasks.spec import SPLITS, Split, TaskSpec

_LOG = logging.getLogger("sparse_ft")


class ScoredTask(NamedTuple):
    """What ``evaluate_task`` found."""

    report: TaskReport
    routing: Routing
    """Of each row, where a gate for texts chose; otherwise of each example, as a whole."""
    usage: Tensor | None
    """[examples, blocks, experts]: mean weights over the tokens where these were routed, else None."""
    blocks: list[int]
    """That ``usage`` is about."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of several tasks on one split."""

    checkpoint: str
    splits: dict[str, Split]
    """Task to the split it was scored on."""
    route: str
    tasks: dict[str, TaskReport]
    routing: RoutingReport
    gated: bool = False
    """Whether a gate chose, so that there is something to see in ``routing``."""

    def to_dict(self) -> dict[str, Any]:
        """Return what ``evaluate --json`` writes."""
        return {
            "checkpoint": self.checkpoint,
            "split": "/".join(dict.fromkeys(self.splits.values())),
            "route": self.route,
            "tasks": {
                task: report_json(entry.score, unseen_rows=entry.unseen_rows) for task, entry in self.tasks.items()
            },
            "routing": self.routing.to_dict(),
        }

    def to_text(self) -> str:
        """Return the classification reports of all tasks as text tables."""
        parts = [
            report_text(entry.score, title=entry.title or task, unseen_rows=entry.unseen_rows)
            for task, entry in self.tasks.items()
        ]
        return "\n".join(parts + ([self.routing.to_text()] if self.gated else []))


def evaluate_task(
    model: SparseExpertModel,
    spec: TaskSpec,
    *,
    split: Split,
    source: str | None,
    encoder: Encoder,
    route: Route,
    ensemble: Ensemble | None = None,
    specs: Mapping[str, TaskSpec] | None = None,
) -> ScoredTask:
    """Read a split of a task and score the model, or an ensemble of its experts, on it.

    Args:
        model: In evaluation mode.
        spec: One of its tasks.
        split: To score on.
        source: Folder or file of its data; None takes the bundled, else the hub's.
        encoder: Of the backbone.
        route: Of the rows.
        ensemble: Answers in place of the route.
        specs: All task files of the model, for an ensemble of several tasks.

    Raises:
        DataError: If the source has no such split, or its answers are hidden.
    """
    found = read(spec, data=source, splits=[split])
    if split not in found:
        raise DataError(f"Task {spec.name!r} has no {split} split in its data. Choose another with --split.")
    data = encode_rows(found[split].to_dict(), spec=spec, encoder=encoder)
    if data.num_rows == 0:
        raise DataError(
            f"The {split} split of task {spec.name!r} has no answers; its publisher hides them. Use --split validation."
        )
    gate, usage, blocks = route.token_gate(spec.name), None, list[int]()
    title = f"{spec.name} · {split}"
    if ensemble is not None:
        logits = ensemble_logits(
            model, specs or {}, ensemble, data.examples, num_rows=data.num_rows, num_parts=data.num_parts
        )
        predictions = find_kind(spec.kind).predictions(logits, columns=data.columns, labels=spec.label_names or [])
        routing = equal_routing(model, ensemble.experts, number=len(data.examples))
        title = f"{title} · {ensemble.combine} of {', '.join(ensemble.experts)}"
    elif gate is not None:
        blocks = model.gated_blocks(gate)
        usage = torch.zeros(len(data.examples), len(blocks), len(model.experts.names))
        predictions = predict_rows(model, spec, data, gate=gate, usage=usage)
        routing = Routing(None, usage.mean(1))
    else:
        stated = spec.language if spec.language != "en" else None  # which is also what files say nothing of
        by_row = route.name == "gate"
        routing = route.rows(
            data.row_examples if by_row else data.examples, _texts(data), task=spec.name, language=stated
        )
        own = routing.take([example.row for example in data.examples]) if by_row else routing
        predictions = predict_rows(model, spec, data, routing=own)
    score = score_rows(spec, data, predictions)
    if score.unseen_labels:
        _LOG.warning(
            "Task %s: labels in %s that training never had, counted as errors: %s",
            spec.name, split, ", ".join(score.unseen_labels),
        )  # fmt: skip
    seen = rows_seen_in_train(spec, split, data=source)
    fresh = [place for place, row in enumerate(data.columns["row"]) if row not in seen]
    unseen = score_rows(spec, data, predictions, rows=fresh) if 0 < len(fresh) < data.num_rows else None
    report = TaskReport(score=score, title=title, unseen_rows=unseen)
    return ScoredTask(report, routing, usage, blocks)


def _own_experts(model: SparseExpertModel, task: str, ensemble: Ensemble | None) -> tuple[str, ...]:
    """Return the experts that a row of the task is meant for."""
    return model.tasks[task].experts if ensemble is None else tuple(ensemble.experts)


def _texts(data: EncodedRows) -> list[str]:
    """Return the rows as text, as prediction shows them to rules."""
    if "text" not in data.columns:
        return [join_words(tokens) for tokens in data.columns["tokens"]]
    seconds = data.columns.get("text_pair", [None] * data.num_rows)
    return [joined(*pair) for pair in zip(data.columns["text"], seconds, strict=True)]


def evaluate(
    checkpoint: str | Path | Checkpoint | LoadedModel,
    *,
    tasks: Sequence[str] | str | None = None,
    data: str | Path | Mapping[str, str] | None = None,
    split: Split | Mapping[str, Split] = "test",
    route: str = "task",
    combine: str | None = None,
    device: str = "auto",
    backbone: str | None = None,
) -> Evaluation:
    """Score a checkpoint.

    Args:
        checkpoint: A folder, or what ``load`` or ``load_checkpoint`` gave, which no other thread may use meanwhile.
        tasks: Some of its tasks; None scores all.
        data: Folder or file for the one task, or task name to such; None takes what each was trained on.
        split: ``train``, ``validation`` or ``test``; or task name to such.
        route: ``task``: every row goes to the expert of its task; ``gate``: the gate chooses for each row; the name of
            an expert: all rows go there; the path of a YAML file: rules choose; or a baseline, see ``routes.ROUTES``.
            The head is that of the task each time.
        combine: ``mix``, ``average`` or ``vote``, see ``ensembles.Combine``: the several experts of a task, and tasks
            with the same labels, answer together, on the data of the first of these tasks.
        device: ``auto``, ``cpu``, ``cuda`` …
        backbone: Where the backbone is now, if not where the checkpoint says.

    Raises:
        ConfigError: If a name is unknown.
        CheckpointError: If the folder is no complete checkpoint.
        DataError: If data is missing or malformed.
    """
    if isinstance(checkpoint, LoadedModel):
        checkpoint = checkpoint.checkpoint
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint, device=find_device(device), backbone=backbone)
    model = checkpoint.model
    way = Route(route, model, seed=checkpoint.config.seed)
    chosen = [tasks] if isinstance(tasks, str) else list(tasks or checkpoint.tasks)
    for task in chosen:
        checkpoint.model.head(task)
    splits = dict(split) if isinstance(split, Mapping) else dict.fromkeys(chosen, split)
    for name in splits.values():
        if name not in SPLITS:
            raise ConfigError(unknown_name("split", name, SPLITS))
    sources = {**checkpoint.config.sources, **name_sources(data, chosen)}
    encoder = Encoder(checkpoint.model.backbone, max_length=checkpoint.config.data.max_length)
    ensembles: dict[str, Ensemble | None] = dict.fromkeys(chosen)
    if combine is not None:
        if route != "task":
            raise ConfigError(f"--combine {combine} and --route {route} both say which experts answer. Choose one.")
        ensembles = find_ensembles(model, checkpoint.tasks, chosen, combine=combine)
    found = {
        task: evaluate_task(
            model,
            checkpoint.tasks[task],
            split=splits[task],
            source=sources.get(task),
            encoder=encoder,
            route=way,
            ensemble=ensemble,
            specs=checkpoint.tasks,
        )
        for task, ensemble in ensembles.items()
    }
    for warning in way.warnings():
        _LOG.warning("%s", warning)
    routed = report_routing(
        {task: scored.routing for task, scored in found.items()},
        experts=model.experts.names,
        own={task: _own_experts(model, task, ensemble) for task, ensemble in ensembles.items()},
        shared=set(model.experts.names) - set(model.routed),
        usage={task: scored.usage for task, scored in found.items() if scored.usage is not None},
        blocks={task: scored.blocks for task, scored in found.items()},
    )
    reports = {task: scored.report for task, scored in found.items()}
    gated = route != "task" or any(model.tasks[task].gated for task in chosen)
    splits = {task: splits[task] for task in found}
    return Evaluation(str(checkpoint.path), splits, route, reports, routed, gated)
