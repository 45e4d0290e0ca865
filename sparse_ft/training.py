"""Train experts: the recipe from a config to a checkpoint, read downwards; the loop is in fitting.py."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sparse_ft.backbone import load_backbone, set_attention
from sparse_ft.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.config import RunConfig, load_config
from sparse_ft.devices import find_device, find_dtype, is_out_of_memory
from sparse_ft.encoding import Encoder, Example
from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.evaluation import Evaluation, evaluate, name_sources, scored_split
from sparse_ft.fitting import fit
from sparse_ft.folders import explain_os_errors, recover_folder, write_json
from sparse_ft.gate_training import fit_gate, routing_accuracy
from sparse_ft.kinds import find_kind
from sparse_ft.manifest import MANIFEST, check_name
from sparse_ft.model import SparseExpertModel
from sparse_ft.reports import report_json
from sparse_ft.resume import Progress, find_resume
from sparse_ft.tasks import TaskSpec, load_task
from sparse_ft.training_data import TrainingTask, prepare_task

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
    tasks: Sequence[str] = (),
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
    stage: Literal["experts", "gate"] = "experts",
) -> TrainResult:
    """Train one expert and one head per task, fit the gate that chooses among them, and write a checkpoint.

    Args:
        tasks: Bundled names, or paths of task files.
        data: Folder or file of the one task's data, or task name to such; None takes bundled data, else the hub.
        output: Folder of the checkpoint; None takes the next free ``runs/<tasks>``.
        backbone: ``minilm``, a folder, or a hub id.
        config: A bundled name, the path of a YAML file, or a config.
        overrides: ``section.key=value`` strings, as ``--set`` takes them.
        from_checkpoint: Start from this checkpoint: its experts are kept; those of ``tasks`` are trained further.
        resume: Continue the interrupted run in ``output``.
        seed: Of everything random.
        device: ``auto``, ``cpu``, ``cuda`` …
        stage: ``experts``, or ``gate`` to fit only the gate of ``from_checkpoint`` anew.

    Raises:
        SparseFTError: For everything that the caller can mend; nothing is written then.
    """
    given = {
        "tasks": [_task_reference(task) for task in tasks] or None,
        "backbone": backbone,
        "seed": seed,
        "device": device,
    }
    values = {key: value for key, value in given.items() if value is not None}
    run = load_config(config, overrides=overrides, values=values)
    if from_checkpoint is not None:
        run = _with(run, {"start": str(Path(from_checkpoint).absolute())})
    if resume:
        run = _resumed_config(run, output, data=data)
    if stage == "gate":
        if run.tasks or resume:
            raise ConfigError("--stage gate fits the gate over all tasks of --from; leave out --task and --resume.")
        return _train_gate(run, data=data, output=output)
    specs = [load_task(task) for task in run.tasks]
    if not specs:
        raise ConfigError("No task is given. Name at least one, e.g. --task ner; `sparse-ft tasks` lists them.")
    names = [check_name(spec.name) for spec in specs]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two tasks have the same name: {', '.join(names)}. Give each task file its own name.")
    if not resume:
        sources = {**run.sources, **name_sources(data, names)}
        run = _with(run, {"sources": sources, "output": str(_free_output(output or run.output, names))})
    return _train(run, specs, resume=resume)


def _task_reference(task: str) -> str:
    """Make the path of a task file absolute, so that a run can be resumed from another folder."""
    return str(Path(task).absolute()) if Path(task).suffix in {".yaml", ".yml"} else str(task)


def _with(run: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Change fields of a config; they count as set."""
    return RunConfig.model_validate({**run.model_dump(exclude_unset=True), **values})


def _resumed_config(
    run: RunConfig, output: str | Path | None, *, data: str | Path | Mapping[str, str] | None
) -> RunConfig:
    """Take over the config of the interrupted run; refuse options that say otherwise."""
    folder = Path(output or run.output or _default_output([load_task(task).name for task in run.tasks]))
    saved = find_resume(folder)
    written = {"output": str(folder.absolute())}
    names = [load_task(task).name for task in saved.tasks]
    asked = _with(run, {"sources": {**run.sources, **name_sources(data, names)}, **written})
    kept = dict(_flat(_with(saved, written).model_dump()))
    different = [key for key, value in _flat(asked.model_dump(exclude_unset=True)) if kept.get(key) != value]
    if different:
        raise ConfigError(
            f"The interrupted run in {str(folder)!r} has other settings: {', '.join(different)}. --resume continues it "
            "unchanged; leave these options out, or start anew in another --output."
        )
    return _with(saved, written)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs.extend(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)])
    return pairs


def _default_output(names: Sequence[str]) -> Path:
    return Path("runs") / ("-".join(names) if len(names) <= 4 else f"{len(names)}-tasks")


def _free_output(output: str | Path | None, names: Sequence[str]) -> Path:
    """Choose the folder to write: the one given if nothing would be lost in it, else the next free default."""
    if output is None:
        base = _default_output(names)
        number, folder = 1, base
        while folder.exists():
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        return folder.absolute()
    folder = Path(output).expanduser().absolute()
    recover_folder(folder)
    recover_folder(folder / "resume")
    if (folder / MANIFEST).exists():
        raise ConfigError(
            f"{str(output)!r} holds a checkpoint already. Choose another --output, or move the old one away."
        )
    if (folder / "resume").exists():
        raise ConfigError(
            f"{str(output)!r} holds an unfinished run. Add --resume to continue it, or choose another --output."
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{str(output)!r} is not empty and no checkpoint. Choose another --output.")
    return folder


def _train(run: RunConfig, specs: Sequence[TaskSpec], *, resume: bool) -> TrainResult:
    device = find_device(run.device)
    output = Path(run.output or "")
    model, kept, metrics = _start_model(run, device)
    encoder = Encoder(model.backbone, max_length=run.data.max_length)
    ready = {spec.name: prepare_task(spec, run=run, encoder=encoder, before=kept.get(spec.name)) for spec in specs}
    for name, task in ready.items():
        if name not in kept:
            _add_task(model, task.spec, run=run)
        model.head(name).dropout = run.train.head_dropout
    _check_gate(run, model)
    model.experts.set_dropout(run.experts.dropout)
    model.to(device)
    with explain_os_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    _LOG.info("Training %s on %s into %s", ", ".join(ready), model.device, output)
    progress = _fit(model, ready, run=run, output=output, resume=resume)
    trained = {name: task.spec for name, task in ready.items()}
    metrics.update({task: {"validation": score} for task, score in progress.best.items()})
    rows = {**_kept_rows(kept, ready, run=run, encoder=encoder), **ready}
    try:
        _add_gate(model, rows, run=run, metrics=metrics)
    except ConfigError as error:  # what was trained is worth keeping without a gate, too
        _LOG.warning("The checkpoint gets no gate. %s", error)
    # The new folder takes the place of the old one with its resume/, which is done with.
    save_checkpoint(output, model=model, tasks={**kept, **trained}, config=run, metrics=metrics)
    evaluation = _evaluate(output, ready, run=run)
    for name, entry in evaluation.tasks.items():
        metrics[name].update(
            {"split": evaluation.splits[name], **report_json(entry.score, unseen_rows=entry.unseen_rows)}
        )
    with explain_os_errors(output / "metrics.json"):
        write_json(output / "metrics.json", metrics)
    rate = progress.tokens / progress.seconds if progress.seconds else 0.0
    return TrainResult(output, evaluation, progress.history, trained, rate)


def _start_model(run: RunConfig, device: torch.device) -> tuple[SparseExpertModel, dict[str, TaskSpec], dict[str, Any]]:
    """Load the backbone, or the checkpoint to start from with its tasks and scores."""
    dtype = find_dtype(run.train.precision, device)
    if run.start is None:
        backbone = load_backbone(run.backbone, revision=run.revision, dtype=dtype)
        model, kept, metrics = SparseExpertModel(backbone, pooling=run.experts.pooling), {}, {}
    else:
        before = load_checkpoint(run.start, dtype=dtype)
        model, kept, metrics = before.model, before.tasks, before.metrics
    if device.type == "cpu" and dtype == torch.bfloat16:
        # Batched matrix products: sdpa's backward in bf16 on a CPU makes a whole step up to 1.7 times slower.
        set_attention(model.backbone, "eager")
    return model, kept, metrics


def _add_task(model: SparseExpertModel, spec: TaskSpec, *, run: RunConfig) -> None:
    settings = run.experts
    modules = model.backbone.select_linears(first_block=settings.first_block, targets=settings.targets)
    kind = find_kind(spec.kind)
    shapes = model.backbone.drops_case if settings.word_shapes is None else settings.word_shapes
    model.experts.create(
        spec.name,
        modules=modules,
        rank=settings.rank,
        alpha=settings.alpha,
        seed=run.seed,
        word_shapes=shapes and kind.level == "word",
    )
    outputs = kind.outputs(spec.label_names or [])
    head = model.add_task(spec.name, expert=spec.name, level=kind.level, num_outputs=len(outputs))
    head.initialise(seed=run.seed, name=spec.name)


def _kept_rows(
    kept: Mapping[str, TaskSpec], ready: Mapping[str, TrainingTask], *, run: RunConfig, encoder: Encoder
) -> dict[str, TrainingTask]:
    """Read the rows of the tasks that were not trained, for the gate; without those that are not there any more."""
    found = {}
    for name, spec in kept.items():
        if name not in ready:
            try:
                found[name] = prepare_task(spec, run=run, encoder=encoder, before=spec)
            except SparseFTError as error:
                _LOG.warning("The gate cannot be fitted without the rows of task %s: %s", name, error)
    return found


def _check_gate(run: RunConfig, model: SparseExpertModel) -> None:
    """Refuse before training what would fail after it."""
    if run.gate.block is not None and run.gate.block >= model.backbone.num_blocks:
        last = model.backbone.num_blocks - 1
        raise ConfigError(f"gate.block is {run.gate.block}, but the blocks are 0 to {last}. Choose one of them.")
    if run.gate.top_k > len(model.experts.names):
        raise ConfigError(
            f"gate.top_k is {run.gate.top_k}, but there are {len(model.experts.names)} experts. Lower it."
        )


def _add_gate(
    model: SparseExpertModel, ready: Mapping[str, TrainingTask], *, run: RunConfig, metrics: dict[str, Any]
) -> None:
    """Fit the gate, if there is something to choose, and note how often it is right on validation rows."""
    model.gate = None
    if len(model.experts.names) < 2:
        return
    examples: dict[str, list[Example]] = {}
    for name, task in ready.items():
        examples.setdefault(model.tasks[name].expert, []).extend(task.examples)
    model.gate = fit_gate(model, examples, settings=run.gate, seed=run.seed)
    for name, task in ready.items():
        accuracy = routing_accuracy(model, task.validation.examples, expert=model.tasks[name].expert)
        metrics.setdefault(name, {})["routing_accuracy"] = accuracy
        _LOG.info("The gate sends %.1f %% of the validation rows of %s to its expert", 100 * accuracy, name)


def _train_gate(
    run: RunConfig, *, data: str | Path | Mapping[str, str] | None, output: str | Path | None
) -> TrainResult:
    """Fit the gate of a checkpoint anew; its experts and heads are copied as they are."""
    if run.start is None:
        raise ConfigError("--stage gate needs the checkpoint with the experts: add --from CHECKPOINT.")
    before = load_checkpoint(run.start, device=find_device(run.device))
    names = list(before.tasks)
    if len(before.model.experts.names) < 2:
        raise ConfigError(f"{run.start!r} has one expert, so there is nothing for a gate to choose.")
    _check_gate(run, before.model)
    idle = sorted(set(before.model.experts.names) - {slot.expert for slot in before.model.tasks.values()})
    if idle:
        raise ConfigError(
            f"The expert {idle[0]!r} of {run.start!r} serves no task, so there are no texts to send to it. Remove it "
            "with `sparse-ft edit`."
        )
    sources = {**before.config.sources, **name_sources(data, names)}
    folder = _free_output(output or run.output, names)
    asked: dict[str, Any] = {
        key: getattr(run, key) for key in ("start", "seed", "device") if key in run.model_fields_set
    }
    run = _with(before.config, {**asked, "sources": sources, "output": str(folder), "gate": run.gate.model_dump()})
    encoder = Encoder(before.model.backbone, max_length=run.data.max_length)
    ready = {name: prepare_task(spec, run=run, encoder=encoder, before=spec) for name, spec in before.tasks.items()}
    metrics = dict(before.metrics)
    _add_gate(before.model, ready, run=run, metrics=metrics)
    save_checkpoint(folder, model=before.model, tasks=before.tasks, config=run, metrics=metrics)
    splits = {name: scored_split(task.spec, run.sources.get(name)) for name, task in ready.items()}
    evaluation = evaluate(folder, tasks=names, split=splits, route="gate", device=run.device)
    return TrainResult(folder, evaluation, [], before.tasks, 0.0)


def _fit(
    model: SparseExpertModel, ready: Mapping[str, TrainingTask], *, run: RunConfig, output: Path, resume: bool
) -> Progress:
    try:
        return fit(model, ready, run=run, output=output, resume=resume)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SparseFTError(
            f"Out of memory on {model.device} with train.batch_size={run.train.batch_size} and "
            f"data.max_length={run.data.max_length}. Lower one of them, or compute each batch in parts with "
            f"--set train.accumulation={run.train.accumulation * 2}, which does not change the result."
        ) from error


def _evaluate(output: Path, tasks: Mapping[str, TrainingTask], *, run: RunConfig) -> Evaluation:
    """Score the checkpoint as it stands on disk."""
    splits = {name: scored_split(task.spec, run.sources.get(name)) for name, task in tasks.items()}
    return evaluate(output, tasks=list(tasks), split=splits, device=run.device)
