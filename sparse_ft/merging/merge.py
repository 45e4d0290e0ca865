"""Merge: several checkpoints become one, with all their experts (``stack``) or with one expert made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sparse_ft.backbone.devices import find_device
from sparse_ft.checkpoint.checkpoint import Checkpoint, save_checkpoint
from sparse_ft.checkpoint.outputs import claimed_output
from sparse_ft.config import changed_config
from sparse_ft.evaluation.evaluate import evaluate_task
from sparse_ft.evaluation.score_report import TaskReport, report_json
from sparse_ft.evaluation.tables import text_table
from sparse_ft.merging.gathering import ExpertPath, Gathered, gather
from sparse_ft.merging.merged_expert import MergedExpert, merge_experts
from sparse_ft.merging.merged_tasks import MergedTask, group_tasks, install, part_tasks
from sparse_ft.merging.methods import MERGE_METHODS
from sparse_ft.merging.search import Search, search_settings
from sparse_ft.merging.settings import AVERAGE, STACK, MergeSettings, merge_settings
from sparse_ft.prediction.routes import find_route
from sparse_ft.tasks.sources import name_sources
from sparse_ft.tasks.spec import Split, TaskSpec
from sparse_ft.training.gate_stage import add_gate, available_rows


class BeforeAfter(NamedTuple):
    """The metric of a task, answered by its expert alone and after the merge."""

    metric: str
    before: float
    after: float


@dataclass(frozen=True)
class Merge:
    """The outcome of ``merge``."""

    path: Path
    changes: list[str]
    """Sentences about what was done."""
    error: float | None = None
    """Relative Frobenius error of all deltas that comes from the rank, 0 to 1; None for ``stack``."""
    errors: dict[str, float] = field(default_factory=dict)
    """The same error for each layer."""
    scores: dict[str, BeforeAfter] = field(default_factory=dict)
    """Scores by task; empty without ``evaluate``."""
    search: Search | None = None

    def to_text(self) -> str:
        """Return what was done, the errors by layer, and the scores as a table."""
        lines = list(self.changes)
        if self.error is not None:
            lines.append(f"Relative error of the deltas by the rank: {self.error:.4f} in all; by layer:")
            lines.extend(f"  {error:.4f}  {module}" for module, error in self.errors.items())
        if self.scores:
            rows = [
                [task, entry.metric, f"{entry.before:.4f}", f"{entry.after:.4f}", f"{entry.after - entry.before:+.4f}"]
                for task, entry in self.scores.items()
            ]
            header = ["task", "metric", "before", "after", "change"]
            lines.extend(["", *text_table(header, rows, num_text_columns=2, min_width=6)])
        return "\n".join(lines)


def merge(  # noqa: D417  # MergeSettings describes the settings
    checkpoints: Sequence[ExpertPath],
    *,
    method: str,
    output: str | Path,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    name: str | None = None,
    heads: str | None = None,
    seed: int | None = None,
    evaluate: bool = False,
    split: Split | None = None,
    search: bool = False,
    budget: int | None = None,
    rows: int | None = None,
    data: str | Path | Mapping[str, str] | None = None,
    device: str = "auto",
    backbone: str | None = None,
    trust_tasks: bool = False,
) -> Merge:
    """Merge the experts of checkpoints and write the outcome as a new one.

    ``stack`` keeps all experts, tasks and heads, which answer as before, bit for bit, and fits a prototype gate on the
    tasks' training texts if these are there. Any other method makes one expert of the deltas of all, which serves all
    tasks, each with its own head. Tasks with the same label names become one. Ranks, alphas and layers may differ.
    Arguments not described here are fields of ``MergeSettings``; None takes the default.

    Args:
        checkpoints: Checkpoints, for all their experts; ``CHECKPOINT/experts/NAME``, for one; or folders of LoRAs that
            PEFT trained, which bring no task. (name, folder) renames a single expert. The first one's config stays.
        output: Folder to write; must be empty or not exist.
        data: Folder or file for the one task, or task name to such; None takes the data of each task's training.
        device: ``auto``, ``cpu``, ``cuda`` …, for scores; the arithmetic is float64 on the CPU.
        backbone: Where the backbone is now, if not where the checkpoints say.
        trust_tasks: Whether tasks of the checkpoints may name code (``metric: evaluate:…``) and data on the hub.

    Raises:
        ConfigError: If a setting is wrong, a name is taken, or the output exists.
        CheckpointError: If a folder is no checkpoint, or has another backbone or pooling than the first.
        DataError: If rows that scores need are missing.
    """
    with claimed_output(output) as folder:
        settings = merge_settings({
            "method": method, "weights": weights, "density": density, "rank": rank, "energy": energy, "name": name,
            "heads": heads, "seed": seed, "evaluate": evaluate, "split": split, "search": search, "budget": budget,
            "rows": rows,
        })  # fmt: skip
        gathered = gather(checkpoints, number_names=method != STACK, backbone=backbone)
        tasks = gathered.checkpoint.tasks
        tasks.update({task: spec.marked(foreign=not trust_tasks) for task, spec in tasks.items()})
        _prepare(gathered.checkpoint, data=data, device=device)
        return (_stack if method == STACK else _merge_into_one)(gathered, settings, folder)


def _prepare(checkpoint: Checkpoint, *, data: str | Path | Mapping[str, str] | None, device: str) -> None:
    """Note where the data of the tasks is, and move the model to the device."""
    sources = {**checkpoint.config.sources, **name_sources(data, list(checkpoint.tasks))}
    checkpoint.config = changed_config(checkpoint.config, {"sources": sources})
    checkpoint.model.to(find_device(device))


def _merge_into_one(gathered: Gathered, settings: MergeSettings, folder: Path) -> Merge:
    """Make one expert of all, which serves all tasks."""
    checkpoint = gathered.checkpoint
    experts = [checkpoint.model.experts.get(name) for name in checkpoint.model.experts.names]
    settings = settings.for_experts(len(experts))
    tasks = group_tasks(part_tasks(checkpoint, called=gathered.original_names), heads=settings.heads)
    before = _reports(checkpoint, checkpoint.tasks, settings)
    search = search_settings(checkpoint, experts, tasks, settings) if settings.search else None
    settings = settings if search is None else search.settings
    merged = merge_experts(experts, settings)
    weights = {expert.name: weight for expert, weight in zip(experts, settings.weights, strict=True)}
    install(checkpoint.model, merged.expert, tasks, weights=weights, heads=settings.heads)
    answered = {part.name: task.spec_of(part) for task in tasks for part in task.parts}
    after = _reports(checkpoint, answered, settings)
    _save_merged(folder, checkpoint, tasks, after, split=settings.split)
    changes = [*gathered.notes, *_describe(settings, merged, tasks, weights=weights, search=search)]
    return Merge(folder, changes, merged.error, merged.errors, _compared(before, after, checkpoint.tasks), search)


def _save_merged(
    folder: Path, checkpoint: Checkpoint, tasks: Sequence[MergedTask], after: Mapping[str, TaskReport], *, split: Split
) -> None:
    """Write the merged model; each task has the data and the scores of its first part."""
    sources = {task.spec.name: task.parts[0].source for task in tasks}
    known = {task: source for task, source in sources.items() if source is not None}
    scored = {task.spec.name: after[task.parts[0].name] for task in tasks if task.parts[0].name in after}
    save_checkpoint(
        folder,
        model=checkpoint.model,
        tasks={task.spec.name: task.spec for task in tasks},
        config=changed_config(checkpoint.config, {"sources": known}),
        metrics={
            task: {"split": split, **report_json(report.score, unseen_rows=report.unseen_rows)}
            for task, report in scored.items()
        },
    )


def _describe(
    settings: MergeSettings,
    merged: MergedExpert,
    tasks: Sequence[MergedTask],
    *,
    weights: Mapping[str, float],
    search: Search | None,
) -> list[str]:
    """Describe in sentences how one expert was made."""
    shown = {
        "weights": ", ".join(f"{name} {weight:g}" for name, weight in weights.items()),
        "density": f"{settings.density:g}",
        "seed": f"{settings.seed}",
    }
    heeds = MERGE_METHODS[settings.method].heeds
    heeded = "; ".join(f"{name} {value}" for name, value in shown.items() if name in heeds) or ", ".join(weights)
    rank = max(merged.expert.ranks.values())
    lines = [
        f"Merged {len(weights)} experts by {settings.method} ({heeded}) into {merged.expert.name!r} of rank {rank}."
    ]
    if search is not None:
        lines.append(
            f"Found in {search.trials} trials on validation rows: mean score {search.score:.4f}, "
            f"{search.start:.4f} with equal weights and the default density."
        )
    for task in tasks:
        if len(task.parts) > 1:
            how = "the average of theirs" if settings.heads == AVERAGE else f"that of {settings.heads!r}"
            names = ", ".join(repr(part.name) for part in task.parts)
            lines.append(f"Task {task.spec.name!r} is made of {names}, which have the same labels; its head is {how}.")
    return lines


def _stack(gathered: Gathered, settings: MergeSettings, folder: Path) -> Merge:
    """Keep all experts side by side, and fit a gate if there are texts."""
    checkpoint = gathered.checkpoint
    changes = [*gathered.notes, *_add_prototypes(checkpoint)]
    route = "task" if checkpoint.model.gate is None else "gate"
    before = _reports(checkpoint, checkpoint.tasks, settings)
    after = _reports(checkpoint, checkpoint.tasks, settings, route=route)
    if settings.evaluate:
        changes.append(f"Scores below: before, of each expert alone; after, stacked, with the {route} deciding.")
    tasks, config, metrics = checkpoint.tasks, checkpoint.config, checkpoint.metrics
    save_checkpoint(folder, model=checkpoint.model, tasks=tasks, config=config, metrics=metrics)
    return Merge(folder, changes, scores=_compared(before, after, checkpoint.tasks))


def _add_prototypes(checkpoint: Checkpoint) -> list[str]:
    """Give a stack a gate that needs no training by gradient, if there are training texts of every expert."""
    model = checkpoint.model
    gate = {**checkpoint.config.gate.model_dump(exclude_unset=True), "type": "prototype"}
    checkpoint.config = changed_config(checkpoint.config, {"gate": gate})
    idle = set(model.experts.names) - {expert for slot in model.tasks.values() for expert in slot.experts}
    if idle:
        return [f"There is no gate: expert {min(idle)!r} serves no task, so no texts belong to it."]
    encoder = checkpoint.encoder
    ready = available_rows(checkpoint.tasks, run=checkpoint.config, encoder=encoder)
    lacking = [task for task in checkpoint.tasks if task not in ready]
    if lacking:
        return [
            f"There is no gate, for want of the training texts of task {lacking[0]!r}. With --data, `sparse-ft train "
            "--stage gate --from` fits one."
        ]
    add_gate(model, ready, run=checkpoint.config, metrics=checkpoint.metrics)
    shares = {task: scores.get("routing_accuracy") for task, scores in checkpoint.metrics.items()}
    right = ", ".join(f"{task} {share:.3f}" for task, share in shares.items() if share is not None)
    groups = [] if model.sequence_gate is None else model.sequence_gate.groups
    together = [f"Answered together, as their texts are the same or alike: {', '.join(group)}." for group in groups]
    rated = f"; right on validation rows: {right}" if right else ""
    return [f"Fitted a prototype gate on the training texts{rated}.", *together]


def _reports(
    checkpoint: Checkpoint, specs: Mapping[str, TaskSpec], settings: MergeSettings, *, route: str = "task"
) -> dict[str, TaskReport]:
    """Score a model, if the settings ask for scores.

    Args:
        checkpoint: Holds the model, its settings and the sources.
        specs: A name in the sources to a task, which reads those rows and names the model's task that answers them.
        settings: Say whether to score, and which split.
        route: As for ``evaluate``.
    """
    if not settings.evaluate:
        return {}
    model, config = checkpoint.model, checkpoint.config
    encoder = checkpoint.encoder
    way = find_route(route, model, seed=config.seed)
    return {
        name: evaluate_task(
            model, spec, split=settings.split, source=config.sources.get(name), encoder=encoder, route=way
        ).report
        for name, spec in specs.items()
    }


def _compared(
    before: Mapping[str, TaskReport], after: Mapping[str, TaskReport], specs: Mapping[str, TaskSpec]
) -> dict[str, BeforeAfter]:
    metrics = {task: specs[task].metric for task in before}
    return {
        task: BeforeAfter(metric, before[task].score.metrics[metric], after[task].score.metrics[metric])
        for task, metric in metrics.items()
    }
