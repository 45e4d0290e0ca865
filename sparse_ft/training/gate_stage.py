"""The gate of a checkpoint: fitted after the experts, or anew on those of a checkpoint (``--stage gate``)."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.outputs import free_output, next_output
from sparse_ft.config import RunConfig, changed_config
from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.evaluation.evaluate import Evaluation, evaluate
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.prediction.routes import Route
from sparse_ft.tasks.sources import name_sources, scored_splits
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training.checks import check_gate
from sparse_ft.training.fit_gate import fit_gate, routing_accuracy
from sparse_ft.training.settings import keep_length, moved_backbone
from sparse_ft.training.training_task import TrainingTask, prepare_task

_LOG = logging.getLogger("sparse_ft")


def kept_rows(
    kept: Mapping[str, TaskSpec], ready: Mapping[str, TrainingTask], *, run: RunConfig, encoder: Encoder
) -> dict[str, TrainingTask]:
    """Read the rows of the tasks that are not trained, for the gate; without those that are not there any more."""
    found = {}
    for name, spec in kept.items():
        if name not in ready:
            try:
                found[name] = prepare_task(spec, run=run, encoder=encoder, before=spec)
            except SparseFTError as error:
                _LOG.warning("The gate cannot be fitted without the rows of task %s: %s", name, error)
    return found


def rows_by_expert(model: SparseExpertModel, ready: Mapping[str, TrainingTask]) -> dict[str, list[Example]]:
    """Sort training rows by the expert that serves them; of several experts of one task, the gate says which.

    The rows of tasks that share a pool belong to no expert.
    """
    examples: dict[str, list[Example]] = {}
    for name, task in ready.items():
        slot = model.tasks[name]
        if slot.joint and len(slot.experts) > 1:
            continue
        owners = [slot.experts[0]] * len(task.row_examples)
        if len(slot.experts) > 1:
            routing = Route("task", model).rows(task.row_examples, task=name)
            owners = [
                model.experts.names[best]
                for best in routing.dense_weights(len(model.experts.names)).argmax(-1).tolist()
            ]
        for owner, example in zip(owners, task.row_examples, strict=True):
            examples.setdefault(owner, []).append(example)
    return examples


def add_gate(
    model: SparseExpertModel,
    ready: Mapping[str, TrainingTask],
    *,
    run: RunConfig,
    metrics: dict[str, Any],
    kept: Collection[str] = (),
) -> None:
    """Fit the gate, if there is something to choose, and note how often it is right on validation rows.

    Args:
        model: With its experts.
        ready: Rows of its tasks.
        run: The run's config.
        metrics: Of each task, where the accuracy is noted.
        kept: Tasks whose answers may not change. A gate that chooses among the experts of one stays.

    Raises:
        ConfigError: If an expert has no rows to fit it on.
    """
    mixed = [task for task, slot in model.tasks.items() if slot.joint]
    if mixed:
        _LOG.info("The gate stays as it is, because task %s was trained with it.", mixed[0])
        return
    split = [task for task in kept if model.tasks[task].gated]
    if split:
        _LOG.warning(
            "The gate stays as it is, because a new one might send texts of task %s to another of its experts. "
            "`sparse-ft train --stage gate --from` fits it anew; until then, name tasks with --task.",
            split[0],
        )
        return
    _forget_accuracy(metrics)
    rows = rows_by_expert(model, ready)
    gated = any(slot.gated for slot in model.tasks.values())
    model.gate = model.gate if gated else None  # one that a task needs stays if no other can be fitted
    if len(model.experts.names) < 2:
        return
    model.gate = fit_gate(model, rows, settings=run.gate, seed=run.seed)
    note_accuracy(model, ready, metrics=metrics)


def note_accuracy(model: SparseExpertModel, ready: Mapping[str, TrainingTask], *, metrics: dict[str, Any]) -> None:
    """Note how many validation rows of each task a gate for texts sends to the task's expert; drop what was noted."""
    _forget_accuracy(metrics)
    for name, task in ready.items():
        experts, gate = model.tasks[name].experts, model.sequence_gate
        if gate is not None and set(experts) < set(gate.names):
            accuracy = routing_accuracy(model, task.validation.row_examples, experts=experts)
            metrics.setdefault(name, {})["routing_accuracy"] = accuracy
            _LOG.info("The gate sends %.1f %% of the validation rows of %s to its expert", 100 * accuracy, name)


def _forget_accuracy(metrics: dict[str, Any]) -> None:
    for entry in metrics.values():
        entry.pop("routing_accuracy", None)


def train_gate(
    run: RunConfig, *, data: str | Path | Mapping[str, str] | None, output: str | Path | None
) -> tuple[Path, Evaluation, dict[str, TaskSpec]]:
    """Fit the gate of a checkpoint anew; its experts and heads are copied as they are.

    Returns:
        The new checkpoint, its scores with the gate routing, and its tasks.
    """
    if run.start is None:
        raise ConfigError("--stage gate needs the checkpoint with the experts: add --from CHECKPOINT.")
    sections = {"experts": run.experts, "train": run.train}
    unheeded = [f"{name}.{key}" for name, section in sections.items() for key in sorted(section.model_fields_set)]
    if unheeded:
        _LOG.warning("Only the gate is fitted: %s say nothing here.", ", ".join(unheeded))
    before = load_checkpoint(run.start, device=find_device(run.device), backbone=moved_backbone(run))
    names = list(before.tasks)
    model = before.model
    if len(model.experts.names) < 2:
        raise ConfigError(f"{run.start!r} has one expert, so there is nothing for a gate to choose.")
    check_gate(run, model, num_experts=len(model.experts.names))
    mixed = [task for task, slot in model.tasks.items() if slot.joint]
    if mixed:
        raise ConfigError(
            f"Task {mixed[0]!r} of {run.start!r} was trained together with the gate; another one would change its "
            "answers. Train both further with --stage joint."
        )
    idle = sorted(set(model.experts.names) - {name for slot in model.tasks.values() for name in slot.experts})
    if idle:
        raise ConfigError(
            f"The expert {idle[0]!r} of {run.start!r} serves no task, so there are no texts to send to it. Remove it "
            "with `sparse-ft edit`."
        )
    sources = {**before.config.sources, **name_sources(data, names)}
    run = keep_length(run, [])
    wanted = output or run.output
    given = None if wanted is None else free_output(wanted)
    asked: dict[str, Any] = {
        key: getattr(run, key) for key in ("start", "seed", "device", "backbone") if key in run.model_fields_set
    }
    rows = {"train_limit": run.data.train_limit} if "train_limit" in run.data.model_fields_set else {}
    run = changed_config(
        before.config,
        {
            **asked,
            "sources": sources,
            "gate": run.gate.model_dump(),
            "data": {**before.config.data.model_dump(), **rows},
        },
    )
    encoder = Encoder(model.backbone, max_length=run.data.max_length)
    ready = {name: prepare_task(spec, run=run, encoder=encoder, before=spec) for name, spec in before.tasks.items()}
    splits = scored_splits(before.tasks, run.sources)
    metrics = dict(before.metrics)
    add_gate(model, ready, run=run, metrics=metrics)
    folder = given or next_output(names)
    run = changed_config(run, {"output": str(folder)})
    save_checkpoint(folder, model=model, tasks=before.tasks, config=run, metrics=metrics)
    evaluation = evaluate(folder, tasks=names, split=splits, route="gate", device=run.device)
    return folder, evaluation, before.tasks
