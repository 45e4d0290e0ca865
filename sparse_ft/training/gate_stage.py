"""The gate of a checkpoint: fitted after the experts, or anew on a finished checkpoint (``--stage gate``)."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.config import RunConfig
from sparse_ft.errors import SparseFTError
from sparse_ft.evaluation.evaluate import Evaluation, evaluate
from sparse_ft.evaluation.external_metrics import check_metric
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.prediction.routes import Route
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.sources import scored_splits, sources_in_memory
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.checks import check_gate_stage
from sparse_ft.training.fit_gate import fit_gate, routing_accuracy
from sparse_ft.training.settings import moved_backbone
from sparse_ft.training.training_task import TrainingTask, prepare_task

_LOG = logging.getLogger("sparse_ft")


def train_gate(
    run: RunConfig, *, sources: Mapping[str, TaskData], trust_tasks: bool = False
) -> tuple[Evaluation, dict[str, TaskSpec]]:
    """Fit the gate of a checkpoint anew, and write a checkpoint with it; experts and heads are copied as they are.

    Args:
        run: The assembled config of a gate stage.
        sources: Data by task.
        trust_tasks: Whether the tasks may name code and data on the hub.

    Returns:
        The scores of the new checkpoint with the gate routing, and its tasks.
    """
    before = load_checkpoint(run.start or "", device=find_device(run.device), backbone=moved_backbone(run))
    model = before.model
    specs = {name: spec.marked(foreign=not trust_tasks) for name, spec in before.tasks.items()}
    for spec in specs.values():
        check_metric(spec)
    check_gate_stage(run, model)
    encoder = model.text_encoder(run.data.max_length)
    tasks = {
        name: prepare_task(spec, run=run, encoder=encoder, before=spec, sources=sources) for name, spec in specs.items()
    }
    splits = scored_splits(specs, sources)
    metrics = dict(before.metrics)
    add_gate(model, tasks, run=run, metrics=metrics)
    output = Path(run.output or "")
    save_checkpoint(output, model=model, tasks=specs, config=run, metrics=metrics)
    data = sources_in_memory(sources, splits)
    evaluation = evaluate(
        output, tasks=list(splits), data=data, split=splits, route="gate", device=run.device, trust_tasks=True
    )
    return evaluation, specs


def available_rows(
    specs: Mapping[str, TaskSpec], *, run: RunConfig, encoder: Encoder, sources: Mapping[str, TaskData] | None = None
) -> dict[str, TrainingTask]:
    """Read the rows of tasks that are not trained, for the gate; a task whose data is not there is left out."""
    tasks = {}
    for name, spec in specs.items():
        try:
            tasks[name] = prepare_task(spec, run=run, encoder=encoder, before=spec, sources=sources)
        except SparseFTError as error:
            _LOG.warning("The gate cannot be fitted without the rows of task %s: %s", name, error)
    return tasks


def rows_by_expert(model: SparseExpertModel, tasks: Mapping[str, TrainingTask]) -> dict[str, list[Example]]:
    """Sort training rows by the expert that serves them; the gate decides among several experts of one task.

    The rows of tasks that share a pool belong to no expert.
    """
    examples: dict[str, list[Example]] = {}
    for name, task in tasks.items():
        slot, rows = model.tasks[name], task.row_examples
        if slot.joint and len(slot.experts) > 1:
            continue
        owners = [slot.experts[0]] * len(rows)
        if len(slot.experts) > 1:
            routing = Route("task", model).rows(rows, task=name)
            weights = routing.dense_weights(len(model.experts.names))  # [rows, experts]
            owners = [model.experts.names[best] for best in weights.argmax(-1).tolist()]
        for owner, example in zip(owners, rows, strict=True):
            examples.setdefault(owner, []).append(example)
    return examples


def add_gate(
    model: SparseExpertModel,
    tasks: Mapping[str, TrainingTask],
    *,
    run: RunConfig,
    metrics: dict[str, Any],
    untrained: Collection[str] = (),
) -> None:
    """Fit a gate if there are several experts, and note its accuracy on validation rows.

    Args:
        model: With its experts.
        tasks: Rows of its tasks.
        run: The run's config.
        metrics: Metrics by task, which get the accuracy.
        untrained: Tasks whose answers may not change. A gate that chooses among the experts of one stays.

    Raises:
        ConfigError: If an expert has no rows to fit the gate on.
    """
    joint = [task for task, slot in model.tasks.items() if slot.joint]
    if joint:
        _LOG.info("The gate stays as it is, because task %s was trained with it.", joint[0])
        return
    split = [task for task in untrained if model.tasks[task].gated]
    if split:
        _LOG.warning(
            "The gate stays as it is, because a new one might send texts of task %s to another of its experts. "
            "`sparse-ft train --stage gate --from` fits it anew; until then, name tasks with --task.",
            split[0],
        )
        return
    _forget_accuracy(metrics)
    rows = rows_by_expert(model, tasks)
    if not any(slot.gated for slot in model.tasks.values()):  # a gate that a task needs stays if none can be fitted
        model.gate = None
    if len(model.routed) < 2:
        return
    model.gate = fit_gate(model, rows, settings=run.gate, seed=run.seed)
    note_accuracy(model, tasks, metrics=metrics)


def note_accuracy(model: SparseExpertModel, tasks: Mapping[str, TrainingTask], *, metrics: dict[str, Any]) -> None:
    """Note which share of each task's validation rows a gate for texts sends to the experts of the task's group."""
    _forget_accuracy(metrics)
    for name, task in tasks.items():
        experts, gate = model.tasks[name].experts, model.sequence_gate
        if gate is not None and len(gate.partition) > 1 and set(experts) < set(gate.names):
            accuracy = routing_accuracy(model, task.validation.row_examples, experts=experts)
            metrics.setdefault(name, {})["routing_accuracy"] = accuracy
            where = "its group" if len(gate.companions(experts[0])) > 1 else "its expert"
            _LOG.info("The gate sends %.1f %% of the validation rows of %s to %s", 100 * accuracy, name, where)


def _forget_accuracy(metrics: dict[str, Any]) -> None:
    for entry in metrics.values():
        entry.pop("routing_accuracy", None)
