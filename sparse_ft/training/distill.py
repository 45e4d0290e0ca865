"""Distil the experts of checkpoints into one shared expert below small ones, which answers in fewer passes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ft.backbone.devices import find_device
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.checkpoint.manifest import read_config, read_manifest
from sparse_ft.config import RunConfig, changed_config, load_config
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.evaluation.evaluate import evaluate
from sparse_ft.evaluation.tables import text_table
from sparse_ft.paths import user_path
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.sources import name_sources, sources_in_memory
from sparse_ft.training.own_blocks import num_passes
from sparse_ft.training.processes import broadcast
from sparse_ft.training.teachers import find_teachers
from sparse_ft.training.train import TrainResult, train

_TOLERANCE = 0.005
"""Drop of a score, half a point, from which a task is named."""


@dataclass(frozen=True)
class Comparison:
    """The score of a task before and after."""

    metric: str
    """Name of the task's metric."""
    teacher: float
    """Score of the teacher, 0 to 1."""
    student: float
    """Score of the new checkpoint on the same rows, 0 to 1."""

    @property
    def drop(self) -> float:
        """Score of the teacher minus that of the student."""
        return self.teacher - self.student


@dataclass(frozen=True)
class Distillation:
    """A checkpoint of a shared expert, and what it costs and scores beside its teachers."""

    training: TrainResult
    tasks: dict[str, Comparison]
    """The tasks that have rows to score."""
    own_blocks: dict[str, int]
    """Task to the highest blocks that it has for itself."""
    num_blocks: int
    """Blocks of the backbone."""
    passes: float
    """Passes through the backbone for the answers of all tasks to one text."""

    @property
    def path(self) -> Path:
        """Folder of the checkpoint."""
        return self.training.path

    def passes_with_more(self, task: str) -> float:
        """Return the passes if a task had one more block for itself."""
        more = {**self.own_blocks, task: self.own_blocks[task] + 1}
        now, then = (num_passes(blocks, num_blocks=self.num_blocks) for blocks in (self.own_blocks, more))
        return self.passes + then - now

    def _advice(self, task: str) -> str:
        """Return how a task gets one more block, unless it has all."""
        more = self.own_blocks[task] + 1
        if more > self.num_blocks:
            return ""
        passes = math.ceil(100 * self.passes_with_more(task)) / 100
        return f" With one more block of its own: --set 'shared.own_blocks={{{task}: {more}}}' --passes {passes:g}"

    def to_text(self) -> str:
        """Return a table of the tasks with their mean, and a line for every task that lost more than half a point."""
        rows = [
            [
                task,
                entry.metric,
                str(self.own_blocks[task]),
                f"{entry.teacher:.4f}",
                f"{entry.student:.4f}",
                f"{-entry.drop:+.4f}",
            ]
            for task, entry in self.tasks.items()
        ]
        if not rows:
            return f"{self.passes:.2f} passes for the answers of all tasks. No task has rows to score."
        teachers, students = ([getattr(e, who) for e in self.tasks.values()] for who in ("teacher", "student"))
        means = [sum(scores) / len(scores) for scores in (teachers, students)]
        footer = ["mean", "", "", f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[1] - means[0]:+.4f}"]
        header = ["task", "metric", "own blocks", "teacher", f"{self.passes:.2f} passes", "difference"]
        lines = text_table(header, rows, [footer], num_text_columns=2, ruled=True)
        for task, entry in self.tasks.items():
            if entry.drop > _TOLERANCE:
                lines.append(f"Task {task} loses {100 * entry.drop:.1f} points.{self._advice(task)}")
        return "\n".join(lines)


def distill(
    checkpoints: Sequence[str | Path] | str | Path,
    *,
    output: str | Path,
    passes: float | None = None,
    tasks: Sequence[str] = (),
    data: TaskData | Mapping[str, TaskData] | None = None,
    backbone: str | None = None,
    config: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    seed: int | None = None,
    device: str | None = None,
    trust_tasks: bool = False,
) -> Distillation:
    """Distil the experts of single tasks into one shared expert with small experts of the tasks on top.

    The answers of all tasks to one text then cost ``passes`` passes through the backbone in place of one a task. The
    shared expert also changes those upper blocks that only some tasks have for themselves.

    Args:
        checkpoints: Folders of the teachers; a task may be in one of them only.
        output: Folder of the new checkpoint.
        passes: The budget, at least 1; None takes ``shared.passes`` of the config, 1.5 by default. It decides how many
            of the highest blocks each task gets for itself.
        tasks: Names of the tasks; none takes all.
        data: Data of the only task, or data by task; None takes what the teachers were trained on.
        backbone: Of the new checkpoint, if it is not that of the teachers.
        config: A bundled name, the path of a YAML file, or a config.
        overrides: ``section.key=value`` strings.
        resume: Continue the interrupted run in ``output``.
        seed: Seed of all random numbers.
        device: ``auto``, ``cpu``, ``cuda`` …
        trust_tasks: Whether the tasks of the checkpoints may name code and data on the hub.

    Raises:
        SparseFTError: For every mistake that the caller can correct; nothing is written before training.
    """
    folders = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if not folders:
        raise ConfigError("No checkpoint is given. Name at least one whose experts teach.")
    paths = [user_path(folder).absolute() for folder in folders]
    _check_known(paths, tasks)
    owners = find_teachers(paths, tasks)
    run = _distill_config(load_config(config, overrides=overrides), owners, passes=passes, backbone=backbone)
    result = train(
        [str(path / "tasks" / f"{name}.yaml") for name, path in owners.items()],
        data=data,
        output=output,
        config=run,
        resume=resume,
        seed=seed,
        device=device,
        trust_tasks=trust_tasks,
    )
    comparisons = broadcast(lambda: _compare(result, owners, data=data, device=device or run.device))
    manifest, config = broadcast(lambda: (read_manifest(result.path), read_config(result.path / "config.yaml")))
    own_blocks, num_blocks = config.shared.own_blocks, manifest.backbone.num_blocks or 1
    return Distillation(result, comparisons, own_blocks, num_blocks, passes=manifest.passes or 1.0)


def _check_known(paths: Sequence[Path], tasks: Sequence[str]) -> None:
    """Refuse a task that no checkpoint has."""
    known = [name for path in paths for name in read_manifest(path).tasks]
    for name in tasks:
        if name not in known:
            raise ConfigError(unknown_name("task of the checkpoints", name, known))


def _distill_config(
    run: RunConfig, owners: Mapping[str, Path], *, passes: float | None, backbone: str | None
) -> RunConfig:
    """Complete a config by the teachers: their data, their backbone, their text length, and the stage."""
    paths = list(dict.fromkeys(owners.values()))
    backbones = {path: read_manifest(path).backbone for path in paths}
    configs = {path: read_config(path / "config.yaml") for path in paths}
    shared = {**run.shared.model_dump(exclude_unset=True), "teachers": [str(path) for path in paths]}
    if passes is not None:
        shared["passes"] = passes
    sources = {name: configs[path].sources[name] for name, path in owners.items() if name in configs[path].sources}
    values: dict[str, Any] = {"stage": "shared", "shared": shared, "sources": {**sources, **run.sources}}
    if backbone is not None:
        values["backbone"] = backbone
    elif "backbone" not in run.model_fields_set:
        if len({entry.weights_sha256 for entry in backbones.values()}) > 1:
            raise ConfigError(
                f"The checkpoints have different backbones: {', '.join(entry.name for entry in backbones.values())}. "
                "Name that of the new checkpoint with --backbone."
            )
        values |= {"backbone": backbones[paths[0]].name, "revision": backbones[paths[0]].revision}
    if "max_length" not in run.data.model_fields_set:
        length = max(config.data.max_length for config in configs.values())
        values["data"] = {**run.data.model_dump(exclude_unset=True), "max_length": length}
    return load_config(run, values=values)


def _compare(
    result: TrainResult,
    owners: Mapping[str, Path],
    *,
    data: TaskData | Mapping[str, TaskData] | None,
    device: str,
) -> dict[str, Comparison]:
    """Score the teachers on the rows that the new checkpoint was scored on, by its sources and its division of rows."""
    sources, scored = read_config(result.path / "config.yaml").sources, result.evaluation
    given = name_sources(data, list(owners), specs=list(result.tasks.values()))
    comparisons = {}
    for path in dict.fromkeys(owners.values()):
        names = [name for name in scored.tasks if owners[name] == path]
        splits = {name: scored.splits[name] for name in names}
        teacher = load_checkpoint(path, device=find_device(device))
        for name in names:
            divided = {"division": result.tasks[name].division}
            teacher.tasks[name] = teacher.tasks[name].model_copy(update=divided)
        teacher.config = changed_config(teacher.config, {"sources": sources})
        in_memory = sources_in_memory(given, names)
        teachers = evaluate(teacher, tasks=names, data=in_memory, split=splits, device=device, trust_tasks=True)
        for name, entry in teachers.tasks.items():
            metric = result.tasks[name].metric
            comparisons[name] = Comparison(
                metric,
                teacher=entry.score.metrics[metric],
                student=scored.tasks[name].score.metrics[metric],
            )
    return comparisons
