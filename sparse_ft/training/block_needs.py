"""Find out before training which tasks need blocks of their own most."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_ft.config import RunConfig, changed_config
from sparse_ft.evaluation.scoring import predict_rows, score_rows
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.tasks.encoded_rows import EncodedRows
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.training.joint import SHARED
from sparse_ft.training.new_experts import add_tasks
from sparse_ft.training.own_blocks import choose_own_blocks, num_passes
from sparse_ft.training.shared_experts import start_from_teachers
from sparse_ft.training.teachers import Teacher
from sparse_ft.training.training_task import TrainingTask

_LOG = logging.getLogger("sparse_ft")

_ROWS = 200
"""Most validation rows of a task by which its need for own blocks is measured."""
_LEAST = 0.001
"""Smallest such need: a loss of 0 may be chance."""


def plan_own_blocks(
    model: SparseExpertModel, tasks: Mapping[str, TrainingTask], teachers: Mapping[str, Teacher], *, run: RunConfig
) -> RunConfig:
    """Return a run that says how many blocks each task has for itself, as many as ``shared.passes`` allows.

    Args:
        model: Without experts.
        tasks: The tasks in training.
        teachers: Of the tasks that have one.
        run: Its ``shared.own_blocks`` stay.
    """
    num_blocks, settings = model.backbone.num_blocks, run.shared
    reads = {name: task.spec.reads for name, task in tasks.items()}
    drops: dict[str, float] = {}
    if any(name not in settings.own_blocks for name in tasks):
        drops = _drops_before_training(model, tasks, teachers, run=run)
    own_blocks = choose_own_blocks(
        list(tasks),
        passes=settings.passes,
        num_blocks=num_blocks,
        fixed=settings.own_blocks,
        drops=drops,
        reads=reads,
    )
    shown = ", ".join(f"{name} {number}" for name, number in own_blocks.items())
    passes = num_passes(own_blocks, num_blocks=num_blocks, reads=reads)
    _LOG.info("Own blocks: %s. All answers to a text cost %.2f passes.", shown, passes)
    return _with_own_blocks(run, own_blocks)


def _with_own_blocks(run: RunConfig, own_blocks: Mapping[str, int]) -> RunConfig:
    return changed_config(
        run, {"shared": {**run.shared.model_dump(exclude_unset=True), "own_blocks": dict(own_blocks)}}
    )


def _drops_before_training(
    model: SparseExpertModel, tasks: Mapping[str, TrainingTask], teachers: Mapping[str, Teacher], *, run: RunConfig
) -> dict[str, float]:
    """Return how far the score of each task is below its teacher's if all use the mean of the teachers' deltas.

    It tells before training which tasks need blocks of their own most. The model is left without experts.
    """
    if not teachers:
        return {}
    drops = {}
    device = model.device
    add_tasks(model, tasks, run=_with_own_blocks(run, dict.fromkeys(tasks, 0)))
    started = start_from_teachers(model, teachers)
    model.to(device).eval()
    for name in started:
        task, teacher = tasks[name], teachers[name]
        rows = task.validation.take(range(min(_ROWS, task.validation.num_rows)))
        score = functools.partial(_headline, task, rows)
        teacher_predictions = find_kind(task.spec.kind).predictions(
            teacher.logits(rows.columns), columns=rows.columns, labels=task.spec.label_names or []
        )
        drops[name] = max(_LEAST, score(teacher_predictions) - score(predict_rows(model, task.spec, rows)))
    for name in tasks:
        model.remove_task(name)
        model.experts.remove(name)
    model.experts.remove(SHARED)
    return drops


def _headline(task: TrainingTask, rows: EncodedRows, predictions: Sequence[Any]) -> float:
    return score_rows(task.spec, rows, predictions).metrics[task.spec.metric]
