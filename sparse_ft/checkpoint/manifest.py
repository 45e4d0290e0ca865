"""The manifest of a checkpoint: what the folder must hold. Needs no torch, so that `inspect` answers at once."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sparse_ft.checkpoint.folders import recover_folder
from sparse_ft.config import RunConfig
from sparse_ft.errors import CheckpointError, explain
from sparse_ft.version import __version__

FORMAT = 1
"""Of the folder; a reader refuses a higher one."""
MANIFEST = "manifest.json"
_KEYS = ("versions", "backbone", "first_block", "pooling", "experts", "tasks", "bytes")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_name(name: str) -> str:
    """Return a name that is safe as a file name.

    Raises:
        CheckpointError: If it is not.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"The name {name!r} is not allowed: use letters, digits, - and _, at most 64, a letter or digit first."
        )
    return name


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint, and that all its files are there in full.

    Raises:
        CheckpointError: If the folder is no checkpoint, is incomplete, or was written by a newer version.
    """
    recover_folder(path)
    file = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"Checkpoint folder {str(path)!r} does not exist.")
    if not file.is_file():
        if (path / "resume").is_dir():
            advice = f"Its training did not finish: `sparse-ft train --resume --output {path}` continues it."
        else:
            advice = "Give the folder that `sparse-ft train` printed."
        raise CheckpointError(f"{str(path)!r} holds no {MANIFEST}, so it is no checkpoint. {advice}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        written_format = int(manifest["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged: {error!r}. Restore the folder from a copy or train again."
        ) from error
    if written_format > FORMAT:
        version = manifest.get("versions", {}).get("sparse_ft", "a newer version")
        raise CheckpointError(
            f"Checkpoint {str(path)!r} has format {written_format}; this sparse-ft {__version__} reads up to {FORMAT}. "
            f"It was written by sparse-ft {version}: update with `pip install -U sparse-ft`."
        )
    lacking = [key for key in _KEYS if key not in manifest]
    if lacking:
        raise CheckpointError(
            f"{str(file)!r} is damaged: it lacks {', '.join(lacking)}. Restore the folder from a copy or train again."
        )
    try:
        names, sizes = (*manifest["experts"], *manifest["tasks"]), dict(manifest["bytes"].items())
        used = {expert for entry in manifest["tasks"].values() for expert in slot_experts(entry)}
        lost = sorted(used - set(manifest["experts"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged: {error!r}. Restore the folder from a copy or train again."
        ) from error
    if lost:
        raise CheckpointError(
            f"{str(file)!r} is damaged: it lacks the expert {lost[0]!r}. Restore the folder from a copy."
        )
    for name in names:
        check_name(name)
    for name, size in sizes.items():
        part = path / name
        found = part.stat().st_size if part.is_file() else None
        if found != size:
            problem = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(
                f"Checkpoint {str(path)!r} is incomplete: {name} {problem}. Copy the folder again, or train again."
            )
    return dict(manifest)


def slot_experts(entry: Mapping[str, Any]) -> list[str]:
    """Return the experts that serve a task, of its entry in a manifest."""
    return [entry["expert"]] if "expert" in entry else list(entry["experts"])


def read_yaml(path: Path) -> Any:
    """Read a YAML file of a checkpoint.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {' '.join(str(error).split())}") from error


def read_config(file: Path) -> RunConfig:
    """Read the config of a run.

    Raises:
        CheckpointError: If it is damaged, or has settings that this version does not know.
    """
    try:
        return RunConfig.model_validate(read_yaml(file))
    except ValidationError as error:
        raise CheckpointError(
            f"{str(file)!r} is not read by this version: {explain(error, RunConfig)} Update sparse-ft, or take these "
            "lines out of the file."
        ) from error


def read_metrics(path: Path) -> dict[str, Any]:
    """Read the scores that were taken when the checkpoint was written, by task; empty without any."""
    file = path / "metrics.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {error}. Delete it; it holds scores only.") from error
