"""Train experts: the recipe from a config to a checkpoint, read downwards; the loop is in fitting.py."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sparse_ft.backbone.backbone import load_backbone, set_training_attention
from sparse_ft.backbone.devices import find_device, find_dtype, is_out_of_memory
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.folders import explain_os_errors, write_json
from sparse_ft.checkpoint.manifest import check_name
from sparse_ft.checkpoint.outputs import free_output, give_back, next_output
from sparse_ft.config import RunConfig, changed_config, load_config
from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.evaluation.evaluate import Evaluation, evaluate
from sparse_ft.evaluation.score_report import report_json
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.tasks.sources import name_sources, scored_splits
from sparse_ft.tasks.spec import Split, TaskSpec, load_task
from sparse_ft.training.checks import check_gate, check_joint, check_kept_experts
from sparse_ft.training.gate_stage import add_gate, kept_rows, note_accuracy, rows_by_expert, train_gate
from sparse_ft.training.joint import has_gate
from sparse_ft.training.loop import fit
from sparse_ft.training.new_experts import add_tasks, start_gate
from sparse_ft.training.new_heads import has_start, start_head
from sparse_ft.training.processes import broadcast, broadcast_module, rank, rank_device
from sparse_ft.training.resume import Progress
from sparse_ft.training.settings import (
    _find_tasks,
    _from_here,
    _resumed_config,
    _sources_of,
    continued_config,
    keep_length,
    moved_backbone,
)
from sparse_ft.training.training_task import TrainingTask, prepare_task

_LOG = logging.getLogger("sparse_ft")


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind."""

    path: Path
    """Folder of the checkpoint."""
    evaluation: Evaluation
    """Scores of the checkpoint as read back from disk, on test; on validation where a task's test has no answers."""
    history: list[dict[str, Any]]
    """Loss and validation scores of each epoch."""
    tasks: dict[str, TaskSpec]
    """The tasks that were trained, all labels filled in."""
    tokens_per_second: float
    """Real tokens, without padding, over the training steps."""

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Metrics of each task."""
        return {task: entry.score.metrics for task, entry in self.evaluation.tasks.items()}


def train(
    tasks: Sequence[str] | str = (),
    *,
    data: str | Path | Mapping[str, str] | None = None,
    output: str | Path | None = None,
    backbone: str | None = None,
    config: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    from_checkpoint: str | Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    device: str | None = None,
    stage: Literal["experts", "gate", "joint"] | None = None,
) -> TrainResult:
    """Train one expert and one head per task, fit the gate that chooses among them, and write a checkpoint.

    Args:
        tasks: Bundled names, paths of task files, or names of tasks in ``from_checkpoint``.
        data: Folder or file of the one task's data, or task name to such; None takes bundled data, else the hub.
        output: Folder of the checkpoint; None takes the next free ``runs/<tasks>``.
        backbone: ``minilm``, a folder, or a hub id.
        config: A bundled name, the path of a YAML file, or a config.
        overrides: ``section.key=value`` strings, as ``--set`` takes them.
        from_checkpoint: Start from this checkpoint: its experts are kept; those of ``tasks`` are trained further.
        resume: Continue the interrupted run in ``output``.
        seed: Of everything random.
        device: ``auto``, ``cpu``, ``cuda`` …
        stage: ``experts`` (the default); ``gate`` to fit only the gate of ``from_checkpoint`` anew; ``joint`` to train
            experts and gate together, the gate mixing ``gate.top_k`` experts for each text or token. A joint run with
            ``from_checkpoint`` and without ``tasks`` trains all tasks of the checkpoint further; a pool of experts
            (``experts.pool``) is always trained jointly.

    Raises:
        SparseFTError: For everything that the caller can mend; nothing is written then.
    """
    given = {
        "tasks": [str(task) for task in ([tasks] if isinstance(tasks, str) else tasks)] or None,
        "backbone": backbone,
        "seed": seed,
        "device": device,
        "stage": stage,
    }
    values = {key: value for key, value in given.items() if value is not None}
    run = _from_here(load_config(config, overrides=overrides, values=values))
    if run.experts.pool and run.stage == "experts":
        run = changed_config(run, {"stage": "joint"})
    if from_checkpoint is not None:
        run = changed_config(run, {"start": str(Path(from_checkpoint).expanduser().absolute())})
    if run.start is not None and not resume:
        run = continued_config(run)
    unresumed = run
    run = broadcast(
        lambda: _resumed_config(unresumed, output, data=data) if resume else _find_tasks(unresumed, unresumed.start)
    )
    if run.stage == "gate":
        if run.tasks or resume:
            raise ConfigError("--stage gate fits the gate over all tasks of --from; leave out --task and --resume.")
        folder, evaluation, specs_of = broadcast(lambda: train_gate(run, data=data, output=output))
        return TrainResult(folder, evaluation, [], specs_of, 0.0)
    specs = [load_task(task) for task in run.tasks]
    if not specs:
        raise ConfigError("No task is given. Name at least one, e.g. --task ner; `sparse-ft tasks` lists them.")
    names = [check_name(spec.name) for spec in specs]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two tasks have the same name: {', '.join(names)}. Give each task file its own name.")
    claimed = False
    if not resume:
        sources = {**_sources_of(run.start), **run.sources, **name_sources(data, names)}
        wanted = output or run.output
        claimed = wanted is None
        folder = broadcast(lambda: next_output(names) if wanted is None else free_output(wanted))
        run = changed_config(keep_length(run, names), {"sources": sources, "output": str(folder)})
    try:
        return _train(run, specs, resume=resume)
    finally:
        if claimed and rank() == 0:
            give_back(Path(run.output or ""))


def _train(run: RunConfig, specs: Sequence[TaskSpec], *, resume: bool) -> TrainResult:
    device = rank_device(find_device(run.device))
    output = Path(run.output or "")
    model, kept, metrics = _start_model(run, device)
    encoder = Encoder(model.backbone, max_length=run.data.max_length)
    ready = {spec.name: prepare_task(spec, run=run, encoder=encoder, before=kept.get(spec.name)) for spec in specs}
    # Test rows are read once before training, so that what is wrong with them does not show after it.
    splits = scored_splits({name: task.spec for name, task in ready.items()}, run.sources)
    new = [task for name, task in ready.items() if name not in model.tasks]
    if run.start is not None and not resume:  # the config of a run that is resumed has every setting
        check_kept_experts(model, list(ready), run=run)
    add_tasks(model, ready, run=run)
    num_experts = run.experts.pool or len(model.routed)
    check_gate(run, model, num_experts=num_experts)
    if run.stage == "joint":
        check_joint(run, num_experts=num_experts)
    model.experts.set_dropout(run.experts.dropout)
    model.to(device).eval()
    if rank() == 0:
        with explain_os_errors(output):
            output.mkdir(parents=True, exist_ok=True)
    _LOG.info("Training %s on %s into %s", ", ".join(ready), model.device, output)
    for task in [] if resume else new:  # what is resumed has moved on from there
        if has_start(model, task.spec):
            start_head(model, task, encoder=encoder)
            broadcast_module(model.head(task.spec.name))
    if has_gate(run):
        rows = {**_others_rows(kept, ready, run=run, encoder=encoder), **ready}
        model.gate = start_gate(model, ready, rows_by_expert(model, rows), run=run)
        broadcast_module(model.gate)
    progress = _fit(model, ready, run=run, output=output, resume=resume)
    metrics.update({task: {"validation": score} for task, score in progress.scores.items()})
    evaluation = broadcast(
        lambda: _finish(model, ready, kept, run=run, encoder=encoder, metrics=metrics, splits=splits)
    )
    rate = progress.tokens / progress.seconds if progress.seconds else 0.0
    trained = {name: task.spec for name, task in ready.items()}
    return TrainResult(output, evaluation, progress.history, trained, rate)


def _finish(
    model: SparseExpertModel,
    ready: Mapping[str, TrainingTask],
    kept: Mapping[str, TaskSpec],
    *,
    run: RunConfig,
    encoder: Encoder,
    metrics: dict[str, Any],
    splits: Mapping[str, Split],
) -> Evaluation:
    """Fit the gate, save the checkpoint in place of the unfinished run, and score it."""
    output = Path(run.output or "")
    try:
        if run.stage == "joint":
            note_accuracy(model, ready, metrics=metrics)
        else:
            rows = {**kept_rows(kept, ready, run=run, encoder=encoder), **ready}
            add_gate(model, rows, run=run, metrics=metrics, kept=kept.keys() - ready.keys())
    except ConfigError as error:  # what was trained is worth keeping without a gate, too
        _LOG.warning("The checkpoint gets no gate. %s", error)
    # The new folder takes the place of the old one with its resume/, which is done with.
    tasks = {**kept, **{name: task.spec for name, task in ready.items()}}
    save_checkpoint(output, model=model, tasks=tasks, config=run, metrics=metrics)
    model.to("cpu")  # makes room on a GPU for the checkpoint, which is read back
    evaluation = evaluate(output, tasks=list(ready), split=splits, device=run.device)
    for name, entry in evaluation.tasks.items():
        metrics[name].update(
            {"split": evaluation.splits[name], **report_json(entry.score, unseen_rows=entry.unseen_rows)}
        )
    with explain_os_errors(output / "metrics.json"):
        write_json(output / "metrics.json", metrics)
    return evaluation


def _start_model(run: RunConfig, device: torch.device) -> tuple[SparseExpertModel, dict[str, TaskSpec], dict[str, Any]]:
    """Load the backbone, or the checkpoint to start from with its tasks and scores."""
    dtype = find_dtype(run.train.precision, device)
    if run.start is None:
        backbone = load_backbone(run.backbone, revision=run.revision, dtype=dtype)
        model, kept, metrics = SparseExpertModel(backbone, pooling=run.experts.pooling), {}, {}
    else:
        before = load_checkpoint(run.start, dtype=dtype, backbone=moved_backbone(run))
        model, kept, metrics = before.model, before.tasks, before.metrics
    set_training_attention(model.backbone, device)
    return model, kept, metrics


def _others_rows(
    kept: Mapping[str, TaskSpec], ready: Mapping[str, TrainingTask], *, run: RunConfig, encoder: Encoder
) -> dict[str, TrainingTask]:
    """Read the rows of the tasks that are not trained, if the gate of a joint run is fitted on them first."""
    reads_texts = run.gate.type == "sequence" and not run.experts.pool
    return kept_rows(kept, ready, run=run, encoder=encoder) if reads_texts else {}


def _fit(
    model: SparseExpertModel, ready: Mapping[str, TrainingTask], *, run: RunConfig, output: Path, resume: bool
) -> Progress:
    try:
        return fit(model, ready, run=run, output=output, resume=resume)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        in_parts = f"--set train.accumulation={run.train.accumulation * 2}, which does not change the result"
        other = "" if run.stage == "joint" else f", or compute each batch in parts with {in_parts}"
        raise SparseFTError(
            f"Out of memory on {model.device} with train.batch_size={run.train.batch_size} and "
            f"data.max_length={run.data.max_length}. Lower one of them{other}."
        ) from error
