"""Score the tasks of a checkpoint on data, and once more on the rows whose text does not occur in train."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint
from sparse_ft.errors import ConfigError, DataError, unknown_name
from sparse_ft.evaluation.external_metrics import check_metric
from sparse_ft.evaluation.routing_report import RoutingReport, report_routing
from sparse_ft.evaluation.score_report import TaskReport, report_json, report_text
from sparse_ft.evaluation.scoring import RoutedPredictions, predict_by_ensemble, predict_by_route, score_rows
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.prediction.ensembles import Ensemble, find_ensembles
from sparse_ft.prediction.routes import Route, find_route
from sparse_ft.tasks.encoded_rows import EncodedRows, encode_rows
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.reading import rows_seen_in_train
from sparse_ft.tasks.sources import ScoredRows, name_sources, read_scored, source_name
from sparse_ft.tasks.spec import SPLITS, Split, TaskSpec

_LOG = logging.getLogger("sparse_ft")


class HasCheckpoint(Protocol):
    """A loaded model, of which only the checkpoint is scored."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The loaded checkpoint."""
        ...


class ScoredTask(NamedTuple):
    """The scores of one task and the predictions behind them."""

    report: TaskReport
    predictions: RoutedPredictions
    held_out: bool = False
    """Whether the rows are those of one source that were held out of the training on it."""


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
    """Whether the routing was chosen by more than the task of a row, so that ``routing`` is worth a table."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``evaluate --json``."""
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
        """Return the reports of all tasks, and that of the routing, as text."""
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
    source: TaskData | None,
    encoder: Encoder,
    route: Route,
    ensemble: Ensemble | None = None,
    specs: Mapping[str, TaskSpec] | None = None,
    trained_on: TaskData | None = None,
) -> ScoredTask:
    """Read a split of a task, or a file whole, and score the model, or an ensemble of its experts, on it.

    Args:
        model: In evaluation mode.
        spec: One of its tasks.
        split: To score on.
        source: Folder or file of its data; None takes the bundled data, else that on the hub.
        encoder: The encoder of the backbone.
        route: Chooses the experts of the rows.
        ensemble: Experts that answer in place of those of the route.
        specs: All task files of the model, for an ensemble of several tasks.
        trained_on: The data that the checkpoint names for the task, see ``sources.read_scored``.

    Raises:
        ConfigError: If the metric is code that a checkpoint names.
        DataError: If the source has no such split, or its answers are hidden.
    """
    check_metric(spec)
    scored = read_scored(spec, split, source, trained_on=trained_on)
    data = _encode_split(spec, scored, encoder=encoder)
    title = f"{spec.name} · {scored.name}"
    if ensemble is None:
        predictions = predict_by_route(model, spec, data, route=route)
    else:
        predictions = predict_by_ensemble(model, specs or {}, spec, data, ensemble=ensemble)
        title = f"{title} · {ensemble.combine} of {', '.join(ensemble.experts)}"
    score = score_rows(spec, data, predictions.rows)
    if score.unseen_labels:
        _LOG.warning(
            "Task %s: labels in %s that training never had, counted as errors: %s",
            spec.name, scored.name, ", ".join(score.unseen_labels),
        )  # fmt: skip
    seen = rows_seen_in_train(spec, split, data=source)
    unseen = [index for index, row in enumerate(data.columns["row"]) if row not in seen]
    partial = 0 < len(unseen) < data.num_rows
    unseen_rows = score_rows(spec, data, predictions.rows, rows=unseen) if partial else None
    return ScoredTask(TaskReport(score=score, title=title, unseen_rows=unseen_rows), predictions, scored.held_out)


def _encode_split(spec: TaskSpec, scored: ScoredRows, *, encoder: Encoder) -> EncodedRows:
    """Encode the rows of a split, or of a file, that have answers."""
    data = encode_rows(scored.rows.to_dict(), spec=spec, encoder=encoder)
    if data.num_rows == 0:
        whole = scored.name not in SPLITS
        raise DataError(
            f"{scored.name} has no answers for task {spec.name!r}. Give its rows answers, or name another file."
            if whole
            else f"The {scored.name} split of task {spec.name!r} has no answers; its publisher hides them. Use --split "
            "validation."
        )
    return data


def evaluate(
    checkpoint: str | Path | Checkpoint | HasCheckpoint,
    *,
    tasks: Sequence[str] | str | None = None,
    data: TaskData | Mapping[str, TaskData] | None = None,
    split: Split | Mapping[str, Split] = "test",
    route: str = "task",
    combine: str | None = None,
    device: str = "auto",
    backbone: str | None = None,
    min_familiarity: float | None = None,
    trust_tasks: bool = False,
) -> Evaluation:
    """Score a checkpoint.

    Args:
        checkpoint: A folder, or what ``load`` or ``load_checkpoint`` returned, which no other thread may use meanwhile.
        tasks: Some of its tasks; None scores all.
        data: Folder or file for the one task, or task name to such; None takes the data that the task was trained on.
            One file, or rows in memory without splits, are scored whole, unless the task was trained on these rows:
            then those that were held out for ``split`` are.
        split: ``train``, ``validation`` or ``test``; or task name to such.
        route: ``task``: the expert of its task serves each row; ``gate``: the gate chooses for each row; the name of
            an expert, which serves all rows; the path of a YAML file with rules; or a baseline, see ``routes.ROUTES``.
            The head is always that of the task.
        combine: ``mix``, ``average`` or ``vote``, see ``ensembles.Combine``: the several experts of a task, and tasks
            with the same labels, answer together, on the data of the first of these tasks.
        device: ``auto``, ``cpu``, ``cuda`` …
        backbone: Path of the backbone, if not that in the checkpoint.
        min_familiarity: With the route ``gate``, the share of each task's own texts to turn away as unknown, 0 to 1;
            None takes that of the checkpoint.
        trust_tasks: Whether task files in the checkpoint may name code (``metric: evaluate:…``) and data on the hub.

    Raises:
        ConfigError: If a name is unknown, there is nothing to turn texts away by, or a task may not name its metric.
        CheckpointError: If the folder is no complete checkpoint.
        DataError: If data is missing or malformed.
    """
    opened = _open(checkpoint, device=device, backbone=backbone, trust_tasks=trust_tasks)
    model = opened.model
    way = find_route(route, model, seed=opened.config.seed, min_familiarity=min_familiarity)
    names = [tasks] if isinstance(tasks, str) else list(opened.tasks if tasks is None else tasks)
    splits = _splits_of(names, split, model=model)
    asked = [opened.tasks[name] for name in names] if tasks else []  # a file for all tasks of a checkpoint is a slip
    given = name_sources(data, names, specs=asked)
    ensembles = _ensembles_of(names, combine, route=route, checkpoint=opened)
    scored = _score_tasks(opened, ensembles, splits=splits, given=given, route=way)
    for warning in way.warnings():
        _LOG.warning("%s", warning)
    return Evaluation(
        checkpoint=str(opened.path),
        splits={task: splits[task] for task in scored},
        route=route,
        tasks={task: entry.report for task, entry in scored.items()},
        routing=_report_routing(model, scored, ensembles),
        gated=bool(scored) and (route != "task" or any(model.tasks[task].gated for task in names)),
    )


def _score_tasks(
    opened: Checkpoint,
    ensembles: Mapping[str, Ensemble | None],
    *,
    splits: Mapping[str, Split],
    given: Mapping[str, TaskData],
    route: Route,
) -> dict[str, ScoredTask]:
    """Score each task on the data that the caller gives for it, or on that of its training."""
    encoder = opened.encoder
    scored = {}
    for task, ensemble in ensembles.items():
        trained_on = opened.config.sources.get(task)
        source = given.get(task, trained_on)
        scored[task] = evaluate_task(
            opened.model, opened.tasks[task], split=splits[task], source=source, encoder=encoder, route=route,
            ensemble=ensemble, specs=opened.tasks, trained_on=trained_on,
        )  # fmt: skip
        if task in given and scored[task].held_out:
            _LOG.info(
                "Task %s was trained on %s: of its rows, the %d held out for %s are scored.",
                task, source_name(source), scored[task].report.score.n, splits[task],
            )  # fmt: skip
    return scored


def _open(
    checkpoint: str | Path | Checkpoint | HasCheckpoint, *, device: str, backbone: str | None, trust_tasks: bool
) -> Checkpoint:
    """Load a folder, or take the checkpoint of a loaded model; its tasks are foreign unless the user trusts them."""
    if isinstance(checkpoint, str | Path):
        opened = load_checkpoint(checkpoint, device=find_device(device), backbone=backbone)
    else:
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else checkpoint.checkpoint
    tasks = {name: spec.marked(foreign=spec.foreign and not trust_tasks) for name, spec in opened.tasks.items()}
    return replace(opened, tasks=tasks)


def _splits_of(
    names: Sequence[str], split: Split | Mapping[str, Split], *, model: SparseExpertModel
) -> Mapping[str, Split]:
    """Return the split of each task, and refuse unknown tasks and splits."""
    for task in names:
        model.head(task)
    splits = split if isinstance(split, Mapping) else dict.fromkeys(names, split)
    for name in splits.values():
        if name not in SPLITS:
            raise ConfigError(unknown_name("split", name, SPLITS))
    return splits


def _ensembles_of(
    names: Sequence[str], combine: str | None, *, route: str, checkpoint: Checkpoint
) -> dict[str, Ensemble | None]:
    """Return the tasks to score, each with the ensemble that answers it; None if the route does."""
    if combine is None:
        return dict.fromkeys(names)
    if route != "task":
        raise ConfigError(f"--combine {combine} and --route {route} both say which experts answer. Choose one.")
    return find_ensembles(checkpoint.model, checkpoint.tasks, names, combine=combine)


def _report_routing(
    model: SparseExpertModel, scored: Mapping[str, ScoredTask], ensembles: Mapping[str, Ensemble | None]
) -> RoutingReport:
    """Count the experts that served the rows of each task, against the experts that its rows are meant for."""
    routed = {task: entry.predictions for task, entry in scored.items()}
    return report_routing(
        {task: predictions.routing for task, predictions in routed.items()},
        experts=model.experts.names,
        own={
            task: model.tasks[task].experts if ensemble is None else tuple(ensemble.experts)
            for task, ensemble in ensembles.items()
        },
        shared=set(model.experts.names) - set(model.routed),
        groups=[] if model.sequence_gate is None else model.sequence_gate.groups,
        usage={task: predictions.usage for task, predictions in routed.items() if predictions.usage is not None},
        blocks={task: predictions.blocks for task, predictions in routed.items()},
    )
