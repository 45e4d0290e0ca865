"""What a run that starts from a checkpoint takes over from it, where its own config says nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_ft.checkpoint.manifest import read_config, read_manifest
from sparse_ft.checkpoint.outputs import default_output
from sparse_ft.config import RunConfig, changed_config
from sparse_ft.errors import ConfigError
from sparse_ft.tasks.sources import name_sources
from sparse_ft.tasks.spec import load_task
from sparse_ft.training.resume import find_resume


def continued_config(run: RunConfig) -> RunConfig:
    """Take over the backbone, the settings of the gate, and in a joint run those of a pool with one A.

    Args:
        run: With ``start``.

    Raises:
        ConfigError: If texts would be pooled otherwise than the checkpoint does.
        CheckpointError: If ``start`` is no complete checkpoint.
    """
    assert run.start is not None
    manifest, before = read_manifest(Path(run.start)), read_config(Path(run.start) / "config.yaml")
    if run.experts.pooling not in ("auto", manifest["pooling"]):
        raise ConfigError(
            f"experts.pooling is {run.experts.pooling}, but the tasks of {run.start!r} pool by {manifest['pooling']}. "
            "Leave it out."
        )
    values: dict[str, Any] = {"gate": _gate(run, before)}
    if "backbone" not in run.model_fields_set:
        values |= {"backbone": manifest["backbone"]["name"], "revision": manifest["backbone"]["revision"]}
    own = run.experts.model_fields_set
    if run.stage == "joint" and before.experts.shared_a and not own & {"pool", "shared_a"}:
        tied = {"pool": before.experts.pool, "shared_a": True}
        values["experts"] = {**run.experts.model_dump(exclude_unset=True), **tied}
    return changed_config(run, values)


def _gate(run: RunConfig, before: RunConfig) -> dict[str, Any]:
    """Return the settings of the gate: the run's own, and those of the checkpoint if it is a gate of the same type."""
    own, old = run.gate.model_dump(exclude_unset=True), before.gate.model_dump(exclude_unset=True)
    suits = old.get("type", "sequence") in (
        ("sequence", "token") if run.stage == "joint" else ("sequence", "prototype")
    )
    if not suits or own.get("type", old.get("type", "sequence")) != old.get("type", "sequence"):
        return own
    return {**old, **own}


def moved_backbone(run: RunConfig) -> str | None:
    """Return where the checkpoint's backbone is now, if not where its manifest says."""
    assert run.start is not None
    named = read_manifest(Path(run.start))["backbone"]["name"]
    return None if run.backbone == named else run.backbone


def keep_length(run: RunConfig, trained: Sequence[str]) -> RunConfig:
    """Cut texts where the checkpoint to start from does, for the sake of its tasks that are not trained.

    Args:
        run: The run's config.
        trained: Tasks of this run.

    Raises:
        ConfigError: If another length is asked for and would change other tasks.
    """
    if run.start is None:
        return run
    before = read_config(Path(run.start) / "config.yaml").data.max_length
    if "max_length" not in run.data.model_fields_set:
        data = {**run.data.model_dump(exclude_unset=True), "max_length": before}
        return changed_config(run, {"data": data})
    kept = [name for name in read_manifest(Path(run.start))["tasks"] if name not in trained]
    if run.data.max_length != before and kept:
        raise ConfigError(
            f"data.max_length is {run.data.max_length}, and {before} in {run.start!r}, so task {kept[0]!r} would read "
            "long texts otherwise. Leave it out, or train that task, too."
        )
    return run


def _find_tasks(run: RunConfig, start: str | None) -> RunConfig:
    """Take the files of a checkpoint for the tasks that it has; a joint run without tasks is one of all of them."""
    if start is None:
        return run
    names = read_manifest(Path(start))["tasks"]
    known = {name: str(Path(start) / "tasks" / f"{name}.yaml") for name in names}
    asked = run.tasks or (list(known) if run.stage == "joint" else [])
    return changed_config(run, {"tasks": [known.get(task, task) for task in asked]}) if asked else run


def _sources_of(checkpoint: str | None) -> dict[str, str]:
    """Return where a checkpoint's tasks had their data from."""
    if checkpoint is None:
        return {}
    read_manifest(Path(checkpoint))
    return read_config(Path(checkpoint) / "config.yaml").sources


def _from_here(run: RunConfig) -> RunConfig:
    """Make the paths in a config absolute, so that a run can be resumed, and its checkpoint used, from elsewhere."""
    paths = {
        "tasks": [_task_reference(task) for task in run.tasks],
        "sources": {task: str(Path(source).expanduser().absolute()) for task, source in run.sources.items()},
        "start": None if run.start is None else str(Path(run.start).expanduser().absolute()),
        "backbone": run.backbone,
    }
    if run.backbone != "minilm" and Path(run.backbone).expanduser().is_dir():
        paths["backbone"] = str(Path(run.backbone).expanduser().resolve())
    return changed_config(run, {key: value for key, value in paths.items() if key in run.model_fields_set})


def _task_reference(task: str) -> str:
    """Make the path of a task file absolute, so that a run can be resumed from another folder."""
    return str(Path(task).absolute()) if Path(task).suffix in {".yaml", ".yml"} else str(task)


def _resumed_config(
    run: RunConfig, output: str | Path | None, *, data: str | Path | Mapping[str, str] | None
) -> RunConfig:
    """Take over the config of the interrupted run; refuse options that say otherwise."""
    wanted = output or run.output
    if wanted is None:
        wanted = default_output([load_task(task).name for task in _find_tasks(run, run.start).tasks])
    folder = Path(wanted).expanduser()
    saved = find_resume(folder)
    run = _find_tasks(run, saved.start) if run.tasks else run
    written = {"output": str(folder.absolute())}
    names = [load_task(task).name for task in saved.tasks]
    asked = changed_config(run, {"sources": {**run.sources, **name_sources(data, names)}, **written})
    kept = dict(_flat(changed_config(saved, written).model_dump()))
    different = [key for key, value in _flat(asked.model_dump(exclude_unset=True)) if kept.get(key) != value]
    if different:
        raise ConfigError(
            f"The interrupted run in {str(folder)!r} has other settings: {', '.join(different)}. --resume continues it "
            "unchanged; leave these options out, or start anew in another --output."
        )
    return changed_config(saved, written)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs.extend(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)])
    return pairs
