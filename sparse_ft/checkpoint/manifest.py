"""The manifest of a checkpoint, which lists the content of the folder. Needs no torch, so `inspect` is fast."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparse_ft.checkpoint.folders import damaged, old_path
from sparse_ft.config import RunConfig
from sparse_ft.documents import read_json_object, read_yaml
from sparse_ft.errors import CheckpointError, explain
from sparse_ft.tasks.spec import Division, TaskSpec, parse_task
from sparse_ft.version import __version__

FORMAT = 1
"""Format number of the folder; higher numbers are refused."""
MANIFEST = "manifest.json"
_KEYS = ("versions", "backbone", "first_block", "pooling", "experts", "tasks", "bytes")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_name(name: str) -> str:
    """Return a name if it is a safe file name.

    Raises:
        CheckpointError: If it is not.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"The name {name!r} is not allowed: use letters, digits, - and _, at most 64, a letter or digit first."
        )
    return name


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint, and that all its files are complete.

    Raises:
        CheckpointError: If the folder is no checkpoint, is incomplete, or was written by a newer version.
    """
    file = _manifest_file(path)
    manifest = read_json_object(file, "it", error=partial(damaged, file))
    try:
        _check_format(path, manifest)
        _check_entries(file, manifest)
        sizes = dict(manifest["bytes"].items())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(file, repr(error)) from error
    _check_sizes(path, sizes)
    return dict(manifest)


def _manifest_file(path: Path) -> Path:
    """Return the file of a checkpoint's manifest, which must exist."""
    if not path.is_dir():
        if old_path(path.absolute()).is_dir():
            raise CheckpointError(
                f"Checkpoint folder {str(path)!r} is being replaced, or its last save was killed. Try again; if no run "
                f"writes it, `sparse-ft train --resume --output {path}` puts it back."
            )
        raise CheckpointError(f"Checkpoint folder {str(path)!r} does not exist.")
    file, advice = path / MANIFEST, "Give the folder that `sparse-ft train` printed."
    if file.is_file():
        return file
    if (path / "resume").is_dir():
        advice = f"Its training did not finish: `sparse-ft train --resume --output {path}` continues it."
    raise CheckpointError(f"{str(path)!r} holds no {MANIFEST}, so it is no checkpoint. {advice}")


def _check_format(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a format that only newer versions read."""
    if int(manifest["format"]) > FORMAT:
        version = manifest.get("versions", {}).get("sparse_ft", "a newer version")
        raise CheckpointError(
            f"Checkpoint {str(path)!r} has format {manifest['format']}; this sparse-ft {__version__} reads up to "
            f"{FORMAT}. It was written by sparse-ft {version}: update with `pip install -U sparse-ft`."
        )


def _check_entries(file: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that lacks a key or an expert, and names that are no safe file names."""
    lacking = [key for key in _KEYS if key not in manifest]
    if lacking:
        raise damaged(file, f"it lacks {', '.join(lacking)}")
    used = {expert for entry in manifest["tasks"].values() for expert in slot_experts(entry)}
    lost = sorted(used - set(manifest["experts"]))
    if lost:
        raise damaged(file, f"it lacks the expert {lost[0]!r}")
    for name in (*manifest["experts"], *manifest["tasks"]):
        check_name(name)


def _check_sizes(path: Path, sizes: Mapping[str, int]) -> None:
    """Refuse a checkpoint of which a file is missing or has another number of bytes than when it was written."""
    for name, size in sizes.items():
        part = path / name
        actual = part.stat().st_size if part.is_file() else None
        if actual != size:
            problem = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise CheckpointError(
                f"Checkpoint {str(path)!r} is incomplete: {name} {problem}. Copy the folder again, or train again."
            )


def slot_experts(entry: Mapping[str, Any]) -> list[str]:
    """Return the experts that serve a task, from the task's entry in a manifest."""
    return [entry["expert"]] if "expert" in entry else list(entry["experts"])


def read_spec(file: Path) -> TaskSpec:
    """Read the file of a task; versions that wrote no division drew the rows at random.

    Raises:
        CheckpointError: If it is no YAML.
        ConfigError: If it is no task.
    """
    spec = parse_task(read_yaml(file, "it", written=True, error=partial(damaged, file)), where=str(file))
    return spec.model_copy(update={"division": spec.division or Division(rule="random")})


def read_config(file: Path) -> RunConfig:
    """Read the config of a run.

    Raises:
        CheckpointError: If it is damaged, or has settings that this version does not know.
    """
    values = read_yaml(file, "it", error=partial(damaged, file))
    if isinstance(values, dict) and isinstance(values.setdefault("data", {}), dict):
        values["data"].setdefault("division", "random")  # the rule of versions that did not write it
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(
            f"{str(file)!r} is not read by this version: {explain(error, RunConfig)} Update sparse-ft, or take these "
            "lines out of the file."
        ) from error


def read_metrics(path: Path) -> dict[str, Any]:
    """Read the scores of each task from when the checkpoint was written; empty without any."""
    file = path / "metrics.json"
    if not file.is_file():
        return {}
    return read_json_object(
        file,
        "it",
        error=lambda problem: CheckpointError(f"{str(file)!r} is damaged: {problem} Delete it; it holds scores only."),
    )
