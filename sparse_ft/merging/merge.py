"""Merge: several checkpoints become one, with all their experts (``stack``) or with one expert made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_bare, save_checkpoint
from sparse_ft.checkpoint.manifest import check_name, read_manifest, slot_experts
from sparse_ft.checkpoint.outputs import free_output
from sparse_ft.config import changed_config
from sparse_ft.errors import CheckpointError, ConfigError, unknown_name
from sparse_ft.evaluation.evaluate import evaluate_task
from sparse_ft.evaluation.score_report import TaskReport, report_json
from sparse_ft.evaluation.tables import text_table
from sparse_ft.merging.edit import add_from, find_experts, new_task_names
from sparse_ft.merging.merged_expert import MergedExpert, MergeSettings, merge_experts, merge_settings
from sparse_ft.merging.merged_tasks import AVERAGE, MergedTask, group_tasks, install, part_tasks
from sparse_ft.merging.methods import MERGE_METHODS
from sparse_ft.merging.search import BUDGET, ROWS, Search, require_optuna, search_settings
from sparse_ft.prediction.routes import Route
from sparse_ft.tasks.sources import name_sources
from sparse_ft.tasks.spec import SPLITS, Split, TaskSpec
from sparse_ft.training.gate_stage import add_gate, kept_rows

STACK = "stack"


class BeforeAfter(NamedTuple):
    """The metric of a task, of its expert alone and of what was merged."""

    metric: str
    before: float
    after: float


@dataclass(frozen=True)
class Merge:
    """What ``merge`` did."""

    path: Path
    changes: list[str]
    """In sentences."""
    error: float | None = None
    """Relative Frobenius error of all deltas that the rank of the outcome brought, 0 to 1; None for ``stack``."""
    errors: dict[str, float] = field(default_factory=dict)
    """Of each layer."""
    scores: dict[str, BeforeAfter] = field(default_factory=dict)
    """By task; empty unless asked for."""
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


class _Parts(NamedTuple):
    """The experts of several checkpoints side by side in one model."""

    checkpoint: Checkpoint
    called: dict[str, str]
    """Task to its name where it comes from."""
    notes: list[str]


def merge(
    checkpoints: Sequence[str | Path | tuple[str | None, str | Path]],
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
) -> Merge:
    """Merge the experts of checkpoints and write the outcome as a new one.

    With ``stack`` the outcome has all experts, tasks and heads, which answer as before, bit for bit, and a prototype
    gate fitted on the tasks' training texts if these are there. With any other method it has one expert, made of the
    deltas of all, which serves all tasks, each with its own head. Tasks with the same label names become one. Ranks,
    alphas and layers may differ, the backbone may not.

    Args:
        checkpoints: Folders of checkpoints, for all their experts, ``CHECKPOINT/experts/NAME`` for one, or folders of
            LoRAs that PEFT trained, which bring no task; (name, folder) gives a single expert and its task another
            name. The first checkpoint's settings are kept.
        method: ``stack`` or a name in ``merge_methods.MERGE_METHODS``, where they are explained.
        output: Folder to write; must be empty or not exist.
        weights: One an expert, in their order; None: all equal with a sum of 1. Methods that add up take negative ones.
        density: Share of the entries of a delta that sparse methods keep, above 0 to 1; None: 0.5.
        rank: Of the merged expert; None, without ``energy``: the sum of the experts' ranks.
        energy: In place of a rank: share of each delta's squared norm to keep, above 0 to 1.
        name: Of the merged expert; None: ``merged``.
        heads: Of tasks with the same labels: ``average`` (as None), the name of the expert whose head is taken, or
            ``separate``, which keeps the tasks apart.
        seed: Of what is dropped at random, and of the search; None: 13.
        evaluate: Whether to score all tasks before and after; with ``stack`` the gate routes after, if there is one.
        split: That is scored; None: ``test``.
        search: Whether to find weights and density on validation rows; needs the extra ``search``.
        budget: Trials of the search; None: 20.
        rows: Validation rows of each task that a trial is scored on, at most; None: 500.
        data: Folder or file for the one task, or task name to such; None takes what each was trained on.
        device: ``auto``, ``cpu``, ``cuda`` …, for scores; the arithmetic is float64 on the CPU.
        backbone: Where the backbone is now, if not where the checkpoints say.

    Raises:
        ConfigError: If a setting is wrong, a name is taken, or the output exists.
        CheckpointError: If a folder is no checkpoint, or has another backbone or pooling than the first.
        DataError: If rows that scores need are missing.
    """
    folder = free_output(output)
    given = {"weights": weights, "density": density, "rank": rank, "energy": energy, "name": name, "heads": heads}
    _check({**given, "search": search or None, "seed": seed}, method=method)
    _check_companions("search", search, {"budget": budget, "rows": rows})
    _check_companions("evaluate", evaluate, {"split": split})
    split = split or "test"
    if split not in SPLITS:
        raise ConfigError(unknown_name("split", split, SPLITS))
    parts = _gather(checkpoints, together=method != STACK, backbone=backbone)
    checkpoint = parts.checkpoint
    sources = {**checkpoint.config.sources, **name_sources(data, list(checkpoint.tasks))}
    checkpoint.config = changed_config(checkpoint.config, {"sources": sources})
    checkpoint.model.to(find_device(device))
    if method == STACK:
        return _stack(parts, folder, split=split if evaluate else None)
    experts = [checkpoint.model.experts.get(expert) for expert in checkpoint.model.experts.names]
    settings = merge_settings(
        method,
        num_experts=len(experts),
        weights=weights,
        density=density,
        rank=rank,
        energy=energy,
        seed=13 if seed is None else seed,
    )
    heads = heads or AVERAGE
    tasks = group_tasks(part_tasks(checkpoint, called=parts.called), heads=heads)
    before = _reports(checkpoint, checkpoint.tasks, split=split) if evaluate else {}
    found = None
    if search:
        found = search_settings(
            checkpoint,
            experts,
            tasks,
            start=settings,
            heads=heads,
            budget=BUDGET if budget is None else budget,
            rows=ROWS if rows is None else rows,
        )
        settings = found.settings
    merged = merge_experts(experts, settings, name=name or "merged")
    weights_of = dict(zip([expert.name for expert in experts], settings.weights, strict=True))
    install(checkpoint.model, merged.expert, tasks, weights=weights_of, heads=heads)
    answered = {part.name: task.spec_of(part) for task in tasks for part in task.parts}
    after = _reports(checkpoint, answered, split=split) if evaluate else {}
    kept = {task.spec.name: task.parts[0].source for task in tasks}
    known = {task: source for task, source in kept.items() if source is not None}
    save_checkpoint(
        folder,
        model=checkpoint.model,
        tasks={task.spec.name: task.spec for task in tasks},
        config=changed_config(checkpoint.config, {"sources": known}),
        metrics={task.spec.name: _as_metrics(after[task.parts[0].name], split) for task in tasks} if after else {},
    )
    changes = [*parts.notes, *_describe(settings, merged, tasks, weights=weights_of, heads=heads, search=found)]
    return Merge(folder, changes, merged.error, merged.errors, _compared(before, after, checkpoint.tasks), found)


def _check(given: Mapping[str, Any], *, method: str) -> None:
    """Refuse what can be refused before anything is read."""
    if method != STACK and method not in MERGE_METHODS:
        raise ConfigError(unknown_name("merge method", method, (STACK, *MERGE_METHODS)))
    useless = [option for option, value in given.items() if value is not None]
    if method == STACK and useless:
        raise ConfigError(f"stack keeps all experts as they are and has no use for --{useless[0]}. Leave it out.")
    if given["seed"] is not None and not given["search"] and "generator" not in MERGE_METHODS[method].heeds:
        raise ConfigError(f"{method} leaves nothing to chance and has no use for --seed. Leave it out.")
    if given["name"] is not None:
        check_name(given["name"])
    if given["search"]:
        require_optuna()
    if given["search"] and (given["weights"] is not None or given["density"] is not None):
        raise ConfigError("--search finds weights and density, and one of them is given. Leave it out, or --search.")


def _check_companions(option: str, given: bool, values: Mapping[str, Any]) -> None:
    """Refuse what only means something beside another option."""
    for name, value in values.items():
        if value is not None and not given:
            raise ConfigError(
                f"--{name} {value} means something with --{option} only. Add --{option}, or leave it out."
            )


def _gather(
    paths: Sequence[str | Path | tuple[str | None, str | Path]], *, together: bool, backbone: str | None
) -> _Parts:
    """Put experts side by side on one backbone.

    Args:
        paths: As given to ``merge``.
        together: Whether they will be one expert: names that collide then get a number, for the time being.
        backbone: Where it is now.
    """
    named = [path if isinstance(path, tuple) else (None, path) for path in paths]
    first = next((found for _, path in named if (found := find_experts(path)) is not None), None)
    if first is None:
        raise CheckpointError(
            f"None of {', '.join(repr(str(path)) for _, path in named)} is a checkpoint or CHECKPOINT/experts/NAME. "
            "Name at least one; it says which backbone the experts stand on."
        )
    checkpoint = load_bare(first.home, backbone=backbone)
    called: dict[str, str] = {}
    notes = []
    for as_name, path in named:
        found = find_experts(path)
        if not together or as_name is not None or found is None:
            changes = add_from(checkpoint, path, as_name=as_name)
            notes.extend(changes[1:] if together and found is not None else changes)  # it does not stay as it was added
            continue
        for expert in found.experts:
            served = _served(found.home, expert)
            unlike = _free_name(checkpoint, expert, served)
            notes.extend(add_from(checkpoint, found.home / "experts" / expert, as_name=unlike)[1:])
            if unlike != expert:
                called |= {new: old for old, new in new_task_names(served, expert=expert, new=unlike).items()}
    if len(checkpoint.model.experts.names) < 2:
        raise ConfigError("There is only one expert to merge. Name another checkpoint, or one with several experts.")
    return _Parts(checkpoint, {task: called.get(task, task) for task in checkpoint.tasks}, notes)


def _served(home: Path, expert: str) -> list[str]:
    return [task for task, entry in read_manifest(home)["tasks"].items() if slot_experts(entry) == [expert]]


def _free_name(checkpoint: Checkpoint, expert: str, served: Sequence[str]) -> str:
    """Return the expert's name, with a number if it or a name that its tasks would get is taken."""
    name, number = expert, 1
    while name in checkpoint.model.experts.names or any(
        task in checkpoint.tasks
        for task in (served if name == expert else new_task_names(served, expert=expert, new=name).values())
    ):
        number += 1
        name = f"{expert}-{number}"
    return name


def _stack(parts: _Parts, folder: Path, *, split: Split | None) -> Merge:
    checkpoint = parts.checkpoint
    changes = [*parts.notes, *_add_prototypes(checkpoint)]
    before, after = {}, {}
    if split is not None:
        before = _reports(checkpoint, checkpoint.tasks, split=split)
        routed = "task" if checkpoint.model.gate is None else "gate"
        after = _reports(checkpoint, checkpoint.tasks, split=split, route=routed)
        changes.append(f"Scores below: before, of each expert alone; after, stacked, with the {routed} deciding.")
    save_checkpoint(
        folder,
        model=checkpoint.model,
        tasks=checkpoint.tasks,
        config=checkpoint.config,
        metrics=checkpoint.metrics,
    )
    return Merge(folder, changes, scores=_compared(before, after, checkpoint.tasks))


def _add_prototypes(checkpoint: Checkpoint) -> list[str]:
    """Give a stack a gate that learns nothing by gradient, if there are training texts of every expert."""
    model = checkpoint.model
    settings = {**checkpoint.config.gate.model_dump(exclude_unset=True), "type": "prototype"}
    checkpoint.config = changed_config(checkpoint.config, {"gate": settings})
    advice = "`sparse-ft train --stage gate --from` fits one."
    idle = set(model.experts.names) - {expert for slot in model.tasks.values() for expert in slot.experts}
    if idle:
        return [f"There is no gate: expert {min(idle)!r} serves no task, so no texts belong to it."]
    encoder = Encoder(model.backbone, max_length=checkpoint.config.data.max_length)
    ready = kept_rows(checkpoint.tasks, {}, run=checkpoint.config, encoder=encoder)
    lacking = [task for task in checkpoint.tasks if task not in ready]
    if lacking:
        return [f"There is no gate, for want of the training texts of task {lacking[0]!r}. With --data, {advice}"]
    add_gate(model, ready, run=checkpoint.config, metrics=checkpoint.metrics)
    shares = {
        task: scores["routing_accuracy"] for task, scores in checkpoint.metrics.items() if "routing_accuracy" in scores
    }
    right = ", ".join(f"{task} {share:.3f}" for task, share in shares.items())
    return [f"Fitted a prototype gate on the training texts; right on validation rows: {right}."]


def _reports(
    checkpoint: Checkpoint, specs: Mapping[str, TaskSpec], *, split: Split, route: str = "task"
) -> dict[str, TaskReport]:
    """Score a model.

    Args:
        checkpoint: Its model, settings and sources.
        specs: A name in the sources to the task that reads those rows and is answered by the model's task of its name.
        split: That is scored; None: ``test``.
        route: As for ``evaluate``.
    """
    model, config = checkpoint.model, checkpoint.config
    encoder = Encoder(model.backbone, max_length=config.data.max_length)
    way = Route(route, model, seed=config.seed)
    return {
        name: evaluate_task(
            model, spec, split=split, source=config.sources.get(name), encoder=encoder, route=way
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


def _as_metrics(report: TaskReport, split: Split) -> dict[str, Any]:
    return {"split": split, **report_json(report.score, unseen_rows=report.unseen_rows)}


def _describe(
    settings: MergeSettings,
    merged: MergedExpert,
    tasks: Sequence[MergedTask],
    *,
    weights: Mapping[str, float],
    heads: str,
    search: Search | None,
) -> list[str]:
    """Say in sentences how one expert was made."""
    row, expert = MERGE_METHODS[settings.method], merged.expert
    used = (
        [f"weights {', '.join(f'{name} {weight:g}' for name, weight in weights.items())}"]
        if "weights" in row.heeds
        else []
    )
    used += [f"density {settings.density:g}"] if "density" in row.heeds else []
    used += [f"seed {settings.seed}"] if "generator" in row.heeds else []
    about = f" ({'; '.join(used)})" if used else f" ({', '.join(weights)})"
    rank = max(expert.ranks.values())
    lines = [f"Merged {len(weights)} experts by {settings.method}{about} into {expert.name!r} of rank {rank}."]
    if search is not None:
        lines.append(
            f"Found in {search.trials} trials on validation rows: mean score {search.score:.4f}, "
            f"{search.start:.4f} with equal weights and the default density."
        )
    for task in tasks:
        if len(task.parts) > 1:
            how = "the average of theirs" if heads == AVERAGE else f"that of {heads!r}"
            names = ", ".join(repr(part.name) for part in task.parts)
            lines.append(f"Task {task.spec.name!r} is made of {names}, which have the same labels; its head is {how}.")
    return lines
