"""Train experts: the recipe from arguments to a checkpoint, read downwards; the loop is in loop.py."""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sparse_ft.backbone.backbone import load_backbone, set_training_attention
from sparse_ft.backbone.devices import find_device, find_dtype, is_out_of_memory
from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.folders import explain_os_errors, write_json
from sparse_ft.checkpoint.manifest import read_metrics, read_spec
from sparse_ft.config import RunConfig, changed_config
from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.evaluation.evaluate import Evaluation, evaluate
from sparse_ft.evaluation.external_metrics import check_metric
from sparse_ft.evaluation.score_report import report_json
from sparse_ft.evaluation.scoring import score_rows
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.prediction.fork_lock import ForkLock
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.sources import say_division, scored_splits, sources_in_memory
from sparse_ft.tasks.spec import Division, Split, TaskSpec
from sparse_ft.training.block_needs import plan_own_blocks
from sparse_ft.training.checks import check_model
from sparse_ft.training.folds import FoldScores, check_folds, fold_specs, gather_scores
from sparse_ft.training.gate_stage import add_gate, available_rows, note_accuracy, rows_by_expert, train_gate
from sparse_ft.training.joint import has_gate
from sparse_ft.training.loop import fit
from sparse_ft.training.new_experts import add_tasks, start_gate
from sparse_ft.training.new_heads import has_start, start_head
from sparse_ft.training.processes import broadcast, broadcast_module, rank, rank_device
from sparse_ft.training.resume import Progress, unscored_tasks
from sparse_ft.training.settings import AssembledRun, assemble_run, moved_backbone
from sparse_ft.training.shared_experts import start_from_teachers
from sparse_ft.training.teachers import Teacher, load_teachers, with_teacher_logits
from sparse_ft.training.training_task import TrainingTask, prepare_task

_LOG = logging.getLogger("sparse_ft")
_TURN = ForkLock(waits=False)
"""Held by the thread that trains: all draw from torch's one generator, which each run seeds."""


@dataclass(frozen=True)
class TrainResult:
    """The checkpoint of a training run, and its scores."""

    path: Path
    """Folder of the checkpoint."""
    evaluation: Evaluation
    """Scores of the checkpoint as read back from disk, on test; on validation where a task's test has no answers."""
    history: list[dict[str, Any]]
    """Loss and validation scores of each epoch."""
    tasks: dict[str, TaskSpec]
    """The trained tasks, with their labels."""
    tokens_per_second: float
    """Tokens, without padding, per second of the training steps."""
    folds: dict[str, FoldScores] = field(default_factory=dict)
    """Scores of each task over the folds of a run with ``folds``."""

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Metrics of each task, of a run with ``folds`` their means."""
        means = {task: entry.mean for task, entry in self.folds.items()}
        return means | {task: entry.score.metrics for task, entry in self.evaluation.tasks.items()}


def train(
    tasks: Sequence[str | TaskSpec] | str | TaskSpec = (),
    *,
    data: TaskData | Mapping[str, TaskData] | None = None,
    output: str | Path | None = None,
    backbone: str | None = None,
    config: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    from_checkpoint: str | Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    device: str | None = None,
    stage: Literal["experts", "gate", "joint", "shared"] | None = None,
    folds: int | None = None,
    trust_tasks: bool = False,
) -> TrainResult:
    """Train one expert and one head per task, fit the gate that chooses among them, and write a checkpoint.

    Threads take turns.

    Args:
        tasks: Bundled names, paths of task files, names of tasks in ``from_checkpoint``, or task objects.
        data: The data of the only task, or task name to data: a folder or file; or in memory a ``datasets.Dataset`` or
            ``DatasetDict``, a pandas DataFrame, or ``(texts, labels)``, which a resumed run must be given again. None
            takes bundled data, else the hub.
        output: Folder of the checkpoint; None takes the next free ``runs/<tasks>``.
        backbone: ``minilm``, a folder, or a hub id.
        config: A bundled name, the path of a YAML file, or a config.
        overrides: ``section.key=value`` strings, as ``--set`` takes them.
        from_checkpoint: Checkpoint to start from: its experts stay; those of ``tasks`` are trained further.
        resume: Continue the interrupted run in ``output``.
        seed: Seed of all random numbers.
        device: ``auto``, ``cpu``, ``cuda`` …
        stage: ``experts`` (the default); ``gate`` to fit only the gate of ``from_checkpoint`` anew; ``joint`` to train
            experts and gate together, the gate mixing ``gate.top_k`` experts for each text or token. A joint run with
            ``from_checkpoint`` and without ``tasks`` trains all tasks of the checkpoint further; a pool of experts
            (``experts.pool``) is always trained jointly. ``shared`` to train one expert for all tasks, with small ones
            of the tasks in the last blocks; see ``distill``.
        folds: At least 2: for each fold of the rows of one file, or rows in memory, a model is trained on the others,
            scored, and thrown away; the checkpoint is trained on all rows (``data.division=all``) and has the means.
        trust_tasks: Whether tasks of ``from_checkpoint`` may name code (``evaluate:…``) and data on the hub.

    Raises:
        SparseFTError: For every mistake that the caller can correct; nothing is written then.
    """
    start = None if from_checkpoint is None else str(from_checkpoint)
    values = {"backbone": backbone, "seed": seed, "device": device, "stage": stage, "start": start}
    with _TURN, contextlib.ExitStack() as claims:
        assembled = broadcast(
            lambda: assemble_run(
                config,
                tasks=tasks,
                values=values,
                overrides=overrides,
                data=data,
                output=output,
                resume=resume,
                claims=claims,
            )
        )
        return _run(assembled, resume=resume, folds=folds, trust_tasks=trust_tasks)


def _run(assembled: AssembledRun, *, resume: bool, folds: int | None, trust_tasks: bool) -> TrainResult:
    """Run what was assembled: folds, the missing scores of a checkpoint, its gate, or experts."""
    run, specs, sources, finished = assembled
    specs = [spec.marked(foreign=spec.foreign and not trust_tasks) for spec in specs]
    if folds is not None:
        check_folds(run, specs, folds=folds, sources=sources, resume=resume)
        return _train_folds(run, specs, sources=sources, folds=folds, trust_tasks=trust_tasks)
    if not specs or finished:
        work = _finish_scores if finished else train_gate
        evaluation, scored = broadcast(lambda: work(run, sources=sources, trust_tasks=trust_tasks))
        return TrainResult(Path(run.output or ""), evaluation, [], scored, 0.0)
    return _train(run, specs, sources=sources, resume=resume, trust_tasks=trust_tasks)


def _train_folds(
    run: RunConfig, specs: Sequence[TaskSpec], *, sources: Mapping[str, TaskData], folds: int, trust_tasks: bool
) -> TrainResult:
    """Score a model on each fold, then train the checkpoint on all rows."""
    evaluations = []
    for number in range(1, folds + 1):
        _LOG.info("Fold %d of %d", number, folds)
        folder = Path(broadcast(lambda: tempfile.mkdtemp(prefix="sparse-ft-fold-")))
        try:
            fold = changed_config(run, {"output": str(folder / "checkpoint")})
            folded = fold_specs(specs, number, folds=folds)
            scored = _train(fold, folded, sources=sources, resume=False, trust_tasks=trust_tasks)
            evaluations.append(scored.evaluation)
        finally:
            if rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
    scores = gather_scores(evaluations)
    for task, entry in scores.items():
        name = next(spec.metric for spec in specs if spec.name == task)
        _LOG.info("Task %s: %s %.3f, spread %.3f over the folds", task, name, entry.mean[name], entry.spread[name])
    run = changed_config(run, {"data": {**run.data.model_dump(exclude_unset=True), "division": "all"}})
    whole = [spec.model_copy(update={"division": Division(rule="all")}) for spec in specs]
    result = replace(_train(run, whole, sources=sources, resume=False, trust_tasks=trust_tasks), folds=scores)
    if rank() == 0:
        metrics = read_metrics(result.path)
        for task, entry in scores.items():
            metrics.setdefault(task, {}).update(entry.to_dict())
        with explain_os_errors(result.path / "metrics.json"):
            write_json(result.path / "metrics.json", metrics)
    return result


def _train(
    run: RunConfig,
    specs: Sequence[TaskSpec],
    *,
    sources: Mapping[str, TaskData],
    resume: bool,
    trust_tasks: bool = False,
) -> TrainResult:
    """Train the experts of tasks, alone or with their gate."""
    device = rank_device(find_device(run.device))
    model, before = _load_start(run, device)
    old = {} if before is None else before.tasks
    old = {name: spec.marked(foreign=not trust_tasks) for name, spec in old.items()}
    if not resume:  # a resumed run was checked when it began, and its config has every setting
        check_model(run, model, specs)
    teachers: dict[str, Teacher] = {}
    if run.stage == "shared":
        model.by_words = any(find_kind(spec.kind).level == "word" for spec in specs)
        teachers = load_teachers(run, [spec.name for spec in specs], device=device, trust_tasks=trust_tasks)
    known = old | {name: teacher.spec for name, teacher in teachers.items()}
    encoder = model.text_encoder(run.data.max_length)
    tasks = {
        spec.name: prepare_task(spec, run=run, encoder=encoder, before=known.get(spec.name), sources=sources)
        for spec in specs
    }
    for task in tasks.values():  # refuse an impossible metric before training
        score_rows(task.spec, task.validation, task.validation.columns[find_kind(task.spec.kind).answer_column])
    trained = {name: task.spec for name, task in tasks.items()}
    # Test rows are read once before training, so that errors in them do not show after it.
    splits = scored_splits(trained, sources)
    for name, spec in trained.items():
        say_division(spec, sources.get(name))
    if run.stage == "shared":
        tasks = with_teacher_logits(tasks, teachers, transfer=run.shared.transfer, encoder=encoder)
        run = broadcast(lambda: plan_own_blocks(model, tasks, teachers, run=run))
    add_tasks(model, tasks, run=run)
    started = start_from_teachers(model, teachers) if teachers else []
    for name in started:
        broadcast_module(model.head(name))
    model.experts.set_dropout(run.experts.dropout)
    model.to(device).eval()
    _LOG.info("Training %s on %s into %s", ", ".join(tasks), model.device, run.output)
    for name, spec in trained.items():
        if not (resume or name in old or name in started) and has_start(model, spec):
            start_head(model, tasks[name], encoder=encoder)
            broadcast_module(model.head(name))
    others = {name: spec for name, spec in old.items() if name not in trained}
    if has_gate(run):
        reads_texts = run.gate.type == "sequence" and not run.experts.pool
        rows = available_rows(others, run=run, encoder=encoder, sources=sources) if reads_texts else {}
        model.gate = start_gate(model, tasks, rows_by_expert(model, {**rows, **tasks}), run=run)
        broadcast_module(model.gate)
    teachers.clear()  # frees their memory
    progress = _fit(model, tasks, run=run, resume=resume)
    metrics = {} if before is None else before.metrics
    metrics.update({task: {"validation": progress.scores[task]} if task in splits else {} for task in tasks})

    def finish() -> Evaluation:
        rows = {} if run.stage == "joint" else available_rows(others, run=run, encoder=encoder, sources=sources)
        _finish_gate(model, tasks, rows, run=run, metrics=metrics)
        save_checkpoint(Path(run.output or ""), model=model, tasks={**old, **trained}, config=run, metrics=metrics)
        model.to("cpu")  # makes room on a GPU for the checkpoint, which is read back
        return _score(run, splits, sources=sources, metrics=metrics)

    evaluation = broadcast(finish)
    rate = progress.tokens / progress.seconds if progress.seconds else 0.0
    return TrainResult(Path(run.output or ""), evaluation, progress.history, trained, rate)


def _load_start(run: RunConfig, device: torch.device) -> tuple[SparseExpertModel, Checkpoint | None]:
    """Load the backbone, or the checkpoint to start from with its model."""
    dtype, before = find_dtype(run.train.precision, device), None
    if run.start is None:
        backbone = load_backbone(run.backbone, revision=run.revision, dtype=dtype)
        model = SparseExpertModel(backbone, pooling=run.experts.pooling)
    else:
        before = load_checkpoint(run.start, dtype=dtype, backbone=moved_backbone(run))
        model = before.model
    set_training_attention(model.backbone, device)
    return model, before


def _fit(model: SparseExpertModel, tasks: Mapping[str, TrainingTask], *, run: RunConfig, resume: bool) -> Progress:
    """Run the training loop in the output folder; say what to change if memory runs out."""
    output = Path(run.output or "")
    if rank() == 0:
        with explain_os_errors(output):
            output.mkdir(parents=True, exist_ok=True)
    try:
        return fit(model, tasks, run=run, output=output, resume=resume)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        in_parts = f"--set train.accumulation={run.train.accumulation * 2}, which does not change the result"
        other = "" if run.stage == "joint" else f", or compute each batch in parts with {in_parts}"
        raise SparseFTError(
            f"Out of memory on {model.device} with train.batch_size={run.train.batch_size} and "
            f"data.max_length={run.data.max_length}. Lower one of them{other}."
        ) from error


def _finish_gate(
    model: SparseExpertModel,
    tasks: Mapping[str, TrainingTask],
    others: Mapping[str, TrainingTask],
    *,
    run: RunConfig,
    metrics: dict[str, Any],
) -> None:
    """Fit the gate on the trained experts, or note the accuracy of the gate that was trained with them."""
    try:
        if run.stage == "joint":
            note_accuracy(model, tasks, metrics=metrics)
        else:
            untrained = [name for name in model.tasks if name not in tasks]
            add_gate(model, {**others, **tasks}, run=run, metrics=metrics, untrained=untrained)
    except ConfigError as error:  # the trained experts are worth keeping without a gate, too
        _LOG.warning("The checkpoint gets no gate. %s", error)


def _finish_scores(
    run: RunConfig, *, sources: Mapping[str, TaskData], trust_tasks: bool
) -> tuple[Evaluation, dict[str, TaskSpec]]:
    """Score the trained tasks of a checkpoint whose run was killed before it did; return the scores and the tasks."""
    output = Path(run.output or "")
    specs = {task: read_spec(output / "tasks" / f"{task}.yaml") for task in unscored_tasks(output)}
    specs = {task: spec.marked(foreign=not trust_tasks) for task, spec in specs.items()}
    for spec in specs.values():
        check_metric(spec)
    _LOG.info("The checkpoint in %s is whole; its scores are missing", output)
    splits = scored_splits(specs, sources)
    return _score(run, splits, sources=sources, metrics=read_metrics(output)), specs


def _score(
    run: RunConfig, splits: Mapping[str, Split], *, sources: Mapping[str, TaskData], metrics: dict[str, Any]
) -> Evaluation:
    """Read the checkpoint back, score the trained tasks that have rows to score, and note their scores in it."""
    output = Path(run.output or "")
    data = sources_in_memory(sources, splits)
    evaluation = evaluate(output, tasks=list(splits), data=data, split=splits, device=run.device, trust_tasks=True)
    for name, entry in evaluation.tasks.items():
        scores = report_json(entry.score, unseen_rows=entry.unseen_rows)
        metrics[name].update({"split": evaluation.splits[name], **scores})
    with explain_os_errors(output / "metrics.json"):
        write_json(output / "metrics.json", metrics)
    return evaluation
