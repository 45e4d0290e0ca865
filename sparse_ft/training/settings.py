"""The config of a run, assembled from arguments, a config, the checkpoint to start from, or the interrupted run."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ft.checkpoint.manifest import MANIFEST, check_name, read_config, read_manifest
from sparse_ft.checkpoint.outputs import claimed_default, claimed_output, claimed_run, default_output
from sparse_ft.config import RunConfig, changed_config, load_config
from sparse_ft.errors import ConfigError
from sparse_ft.paths import user_path
from sparse_ft.tasks.in_memory import TaskData
from sparse_ft.tasks.sources import name_sources
from sparse_ft.tasks.spec import Division, TaskSpec, load_task
from sparse_ft.training.checks import check_settings, check_stage
from sparse_ft.training.resume import find_resume

_LOG = logging.getLogger("sparse_ft")


class AssembledRun(NamedTuple):
    """The settings of a run that may start."""

    run: RunConfig
    """The config, with the tasks and the output folder."""
    specs: list[TaskSpec]
    """The tasks in training; none in a gate stage, whose config is that of the checkpoint."""
    sources: dict[str, TaskData]
    """The data of each task: the paths that the config names, and data in memory, which no config can hold."""
    finished: bool = False
    """Whether the output folder holds the checkpoint already, without its scores."""


def assemble_run(
    config: str | Path | RunConfig | None,
    *,
    tasks: Sequence[str | TaskSpec] | str | TaskSpec,
    values: Mapping[str, Any],
    overrides: Sequence[str],
    data: TaskData | Mapping[str, TaskData] | None,
    output: str | Path | None,
    resume: bool,
    claims: contextlib.ExitStack,
) -> AssembledRun:
    """Assemble and check the config of a run, and claim its output folder.

    Args:
        config: A bundled name, the path of a YAML file, or a config.
        tasks: Names or task files, or tasks in memory.
        values: Other top-level settings that win over config and overrides, unless they are None.
        overrides: ``section.key=value`` strings.
        data: The data of the only task, or data by task.
        output: Folder of the checkpoint; None takes the config's, else the next free one.
        resume: Whether to continue the interrupted run in ``output``.
        claims: Holds the output folder until it is closed.

    Raises:
        SparseFTError: If a setting is wrong or another process writes the folder; nothing is written then.
    """
    requested = [tasks] if isinstance(tasks, str | TaskSpec) else list(tasks)
    specs = {task.name: task for task in requested if isinstance(task, TaskSpec)}
    names = [task.name if isinstance(task, TaskSpec) else str(task) for task in requested]
    values = {key: value for key, value in {**values, "tasks": names or None}.items() if value is not None}
    run = _absolute_paths(load_config(config, overrides=overrides, values=values))
    if run.experts.pool and run.stage == "experts":
        run = changed_config(run, {"stage": "joint"})
    check_stage(run, resume=resume)
    if resume:
        return _resumed_run(run, specs, data=data, output=output, claims=claims)
    run = _explicit_epochs(run)
    run = _checkpoint_tasks(_checkpoint_settings(run), run.start, specs)
    trained = _load_specs(run.tasks, specs, run=run)
    names = [check_name(spec.name) for spec in trained]
    output = output or run.output
    check_settings(run, names, output=output)
    if run.stage == "gate":
        run, trained = _gate_stage_run(run), []
        names = list(read_manifest(Path(run.start or "")).tasks)
    before = {} if run.start is None else _checkpoint_config(run.start).sources
    sources = {**before, **run.sources, **name_sources(data, names, specs=trained)}
    folder = claims.enter_context(claimed_default(names) if output is None else claimed_output(output))
    run = changed_config(run, {"sources": _paths(sources), "output": str(folder)})
    return AssembledRun(run, trained, sources)


def _explicit_epochs(run: RunConfig) -> RunConfig:
    """Let epochs that the user sets win over the default of the fewest steps."""
    if "epochs" not in run.train.model_fields_set or "min_steps" in run.train.model_fields_set:
        return run
    return changed_config(run, {"train": {**run.train.model_dump(exclude_unset=True), "min_steps": 0}})


def moved_backbone(run: RunConfig) -> str | None:
    """Return where the checkpoint's backbone is now, if not where its manifest says."""
    assert run.start is not None
    named = read_manifest(Path(run.start)).backbone.name
    return None if run.backbone == named else run.backbone


def _absolute_paths(run: RunConfig) -> RunConfig:
    """Make the paths in a config absolute, so that a run can be resumed, and its checkpoint used, from elsewhere."""
    values: dict[str, Any] = {
        "tasks": [str(Path(task).absolute()) if Path(task).suffix in {".yaml", ".yml"} else task for task in run.tasks],
        "sources": {task: str(user_path(source).absolute()) for task, source in run.sources.items()},
        "start": None if run.start is None else str(user_path(run.start).absolute()),
        "backbone": run.backbone,
    }
    if run.shared.teachers:
        teachers = [str(user_path(path).absolute()) for path in run.shared.teachers]
        values["shared"] = {**run.shared.model_dump(exclude_unset=True), "teachers": teachers}
    if run.backbone != "minilm" and user_path(run.backbone).is_dir():
        values["backbone"] = str(user_path(run.backbone).resolve())
    return changed_config(run, {key: value for key, value in values.items() if key in run.model_fields_set})


def _checkpoint_config(start: str) -> RunConfig:
    read_manifest(Path(start))  # refuses an incomplete checkpoint
    return read_config(Path(start) / "config.yaml")


def _checkpoint_settings(run: RunConfig) -> RunConfig:
    """Take over backbone, text length and gate settings of the checkpoint, and in a joint run those of a tied pool."""
    if run.start is None:
        return run
    manifest, before = read_manifest(Path(run.start)), _checkpoint_config(run.start)
    values: dict[str, Any] = {"gate": _gate_settings(run, before)}
    if "backbone" not in run.model_fields_set:
        values |= {"backbone": manifest.backbone.name, "revision": manifest.backbone.revision}
    if "max_length" not in run.data.model_fields_set:
        values["data"] = {**run.data.model_dump(exclude_unset=True), "max_length": before.data.max_length}
    if run.stage == "joint" and before.experts.shared_a and not run.experts.model_fields_set & {"pool", "shared_a"}:
        tied = {"pool": before.experts.pool, "shared_a": True}
        values["experts"] = {**run.experts.model_dump(exclude_unset=True), **tied}
    return changed_config(run, values)


def _gate_settings(run: RunConfig, before: RunConfig) -> dict[str, Any]:
    """Return the run's gate settings, completed by those of a checkpoint that has a gate of the same type."""
    settings, old = run.gate.model_dump(exclude_unset=True), before.gate.model_dump(exclude_unset=True)
    old_type = old.get("type", "sequence")
    other_type = "token" if run.stage == "joint" else "prototype"
    same_type = old_type in ("sequence", other_type) and settings.get("type", old_type) == old_type
    return {**old, **settings} if same_type else settings


def _checkpoint_tasks(run: RunConfig, start: str | None, specs: Mapping[str, TaskSpec]) -> RunConfig:
    """Replace names of tasks that a checkpoint has by its task files; a joint run without tasks trains all of them."""
    if start is None:
        return run
    names = [name for name in read_manifest(Path(start)).tasks if name not in specs]
    files = {name: str(Path(start) / "tasks" / f"{name}.yaml") for name in names}
    tasks = run.tasks or (list(files) if run.stage == "joint" else [])
    return changed_config(run, {"tasks": [files.get(task, task) for task in tasks]}) if tasks else run


def _load_specs(tasks: Sequence[str], specs: Mapping[str, TaskSpec], *, run: RunConfig) -> list[TaskSpec]:
    """Return tasks from memory where ``specs`` has the name, else from their files; the run says the division.

    Tasks whose files lie in a checkpoint are foreign.
    """
    loaded = [specs[task] if task in specs else load_task(task).marked(foreign=_in_checkpoint(task)) for task in tasks]
    return [spec.model_copy(update={"division": Division(rule=run.data.division)}) for spec in loaded]


def _in_checkpoint(task: str) -> bool:
    """Whether a task is a file of a checkpoint."""
    folder = Path(task).absolute().parent
    return folder.name == "tasks" and (folder.parent / MANIFEST).is_file()


def _gate_stage_run(run: RunConfig) -> RunConfig:
    """Return the config of the checkpoint, with the requested gate, seed, device, backbone and number of rows."""
    sections = {"experts": run.experts, "train": run.train}
    ignored = [f"{name}.{key}" for name, section in sections.items() for key in sorted(section.model_fields_set)]
    if ignored:
        _LOG.warning("Only the gate is fitted: %s say nothing here.", ", ".join(ignored))
    before = _checkpoint_config(run.start or "")
    keys = [key for key in ("start", "seed", "device", "backbone") if key in run.model_fields_set]
    rows = {"train_limit": run.data.train_limit} if "train_limit" in run.data.model_fields_set else {}
    return changed_config(
        before,
        {
            **{key: getattr(run, key) for key in keys},
            "gate": run.gate.model_dump(),
            "data": {**before.data.model_dump(), **rows},
        },
    )


def _resumed_run(
    run: RunConfig,
    specs: Mapping[str, TaskSpec],
    *,
    data: TaskData | Mapping[str, TaskData] | None,
    output: str | Path | None,
    claims: contextlib.ExitStack,
) -> AssembledRun:
    """Take over the config of the interrupted run; refuse settings that differ from it."""
    output = output or run.output
    if output is None:
        tasks = _checkpoint_tasks(run, run.start, specs).tasks
        output = default_output([spec.name for spec in _load_specs(tasks, specs, run=run)])
    folder = claims.enter_context(claimed_run(output))
    saved = changed_config(find_resume(user_path(output)), {"output": str(folder)})
    if run.tasks:
        run = _checkpoint_tasks(run, saved.start, specs)
    try:
        loaded = _load_specs(saved.tasks, specs, run=saved)
    except ConfigError as error:
        raise ConfigError(
            f"{error} The interrupted run in {str(folder)!r} trains this task. Give its TaskSpec to train() again."
        ) from error
    sources = {**run.sources, **name_sources(data, [spec.name for spec in loaded], specs=loaded)}
    requested = changed_config(run, {"sources": _paths(sources), "output": saved.output})
    settings = dict(_flat(saved.model_dump()))
    different = [key for key, value in _flat(requested.model_dump(exclude_unset=True)) if settings.get(key) != value]
    if different:
        raise ConfigError(
            f"The interrupted run in {str(folder)!r} has other settings: {', '.join(different)}. --resume continues it "
            "unchanged; leave these options out, or start anew in another --output."
        )
    return AssembledRun(saved, loaded, {**saved.sources, **sources}, finished=(folder / MANIFEST).is_file())


def _paths(sources: Mapping[str, TaskData]) -> dict[str, str]:
    """Return the sources that a config can name: no data in memory."""
    return {task: source for task, source in sources.items() if isinstance(source, str)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs.extend(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)])
    return pairs
