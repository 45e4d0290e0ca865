"""Train experts: the recipe from a config to a checkpoint, read downwards; the loop is in fitting.py."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_ft.backbone import load_backbone, set_attention
from sparse_ft.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.config import RunConfig, load_config
from sparse_ft.devices import find_device, find_dtype, is_out_of_memory
from sparse_ft.encoding import Encoder
from sparse_ft.errors import ConfigError, DataError, SparseFTError
from sparse_ft.evaluation import Evaluation, evaluate, name_sources, prepare, score_rows, scored_split
from sparse_ft.fitting import TrainingTask, fit
from sparse_ft.folders import explain_os_errors, recover_folder, write_json
from sparse_ft.kinds import find_kind
from sparse_ft.kinds.classification import IGNORED
from sparse_ft.manifest import MANIFEST, check_name
from sparse_ft.model import SparseExpertModel
from sparse_ft.readers import label_names, read
from sparse_ft.reports import report_json
from sparse_ft.resume import Progress, find_resume
from sparse_ft.tasks import TaskSpec, load_task

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
) -> TrainResult:
    """Train one expert and one head per task and write a checkpoint.

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
    ready = {spec.name: _prepare_task(spec, run=run, encoder=encoder, before=kept.get(spec.name)) for spec in specs}
    for name, task in ready.items():
        if name not in kept:
            _add_task(model, task.spec, run=run)
    model.experts.set_dropout(run.experts.dropout)
    model.to(device)
    with explain_os_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    _LOG.info("Training %s on %s into %s", ", ".join(ready), model.device, output)
    progress = _fit(model, ready, run=run, output=output, resume=resume)
    trained = {name: task.spec for name, task in ready.items()}
    metrics.update({task: {"validation": score} for task, score in progress.best.items()})
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


def _prepare_task(spec: TaskSpec, *, run: RunConfig, encoder: Encoder, before: TaskSpec | None) -> TrainingTask:
    """Read and encode the training and validation rows of a task."""
    found = read(spec, data=run.sources.get(spec.name), splits=["train", "validation"])
    if "train" not in found or len(found["train"]) == 0:
        raise DataError(f"Task {spec.name!r} has no training rows. Name a folder or file that has some with --data.")
    labels = label_names(spec, found["train"])
    if before is not None:
        extra = sorted(set(labels) - set(before.label_names or []))
        if extra:
            raise DataError(
                f"Task {spec.name!r} in {run.start!r} has no label {extra[0]!r}. Its head was trained on: "
                f"{', '.join(before.label_names or [])}. Rename the task to train a new expert for other labels."
            )
        labels = before.label_names or labels
    spec = spec.model_copy(update={"labels": spec.labels if isinstance(spec.labels, dict) else labels})
    rows = found["train"]
    if run.data.train_limit is not None and len(rows) > run.data.train_limit:
        rows = rows.shuffle(seed=run.seed).select(range(run.data.train_limit))
    kind = find_kind(spec.kind)
    if encoder.last_piece and kind.level == "word":
        _LOG.warning(
            "Backbone %s is causal: a word sees only what stands left of it. Task %s will tag better on a BERT.",
            run.backbone,
            spec.name,
        )
    examples = kind.encode(rows.to_dict(), encoder=encoder, labels=labels, language=spec.language)
    examples = [example for example in examples if any(target != IGNORED for target in example.targets)]
    validation = prepare(found["validation"].to_dict(), spec=spec, encoder=encoder)
    if not examples or validation.num_rows == 0:
        raise DataError(
            f"Task {spec.name!r} has {len(examples)} training and {validation.num_rows} validation rows with answers."
        )
    score_rows(
        spec, validation, kind.references(validation.columns)
    )  # an impossible metric shows here, not after an epoch
    return TrainingTask(spec, examples, validation)


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
    head = model.add_task(
        spec.name, expert=spec.name, level=kind.level, num_outputs=len(outputs), dropout=run.train.head_dropout
    )
    head.initialise(seed=run.seed, name=spec.name)


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
