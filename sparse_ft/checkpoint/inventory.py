"""The files of a checkpoint against the list in its manifest: sizes, hashes, links, and files that nobody listed."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field

from sparse_ft.errors import CheckpointError

_FOLDERS = ("experts", "heads", "tasks", "tokenizer")
"""Folders of which every file is read, so every file must be listed."""
_SUFFIXES = {".json", ".jinja", ".model", ".safetensors", ".txt", ".yaml"}
"""Files of a checkpoint hold numbers, words and settings; never code or pickles."""
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def _check_path(path: str) -> str:
    """Return the path of a file inside a checkpoint, relative to it, if it stays inside and holds no code."""
    if not all(_PART.fullmatch(part) for part in path.split("/")):
        raise ValueError("expected the path of a file inside the checkpoint")
    if PurePosixPath(path).suffix not in _SUFFIXES:
        raise ValueError(f"a checkpoint holds only {', '.join(sorted(_SUFFIXES))}")
    return path


FilePath = Annotated[str, AfterValidator(_check_path)]
"""Path of a file relative to the checkpoint, with slashes."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal digits."""


def hash_file(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path) -> list[Path]:
    """List the files that a manifest describes: all but the manifest and the scores."""
    return sorted(
        file for file in folder.rglob("*") if file.is_file() and file.name not in {"manifest.json", "metrics.json"}
    )


def check_files(folder: Path, *, sizes: Mapping[str, int], hashes: Mapping[str, str] | None) -> None:
    """Refuse a checkpoint whose files are not exactly those that were written.

    Args:
        folder: The checkpoint.
        sizes: File to its number of bytes.
        hashes: File to its sha256; None for a checkpoint whose manifest has none.

    Raises:
        CheckpointError: If a file is missing, is another one, or is a link out of the folder, or if the manifest does
            not list it.
    """
    try:
        _check_all(folder, sizes, hashes)
    except OSError as error:
        raise CheckpointError(
            f"Checkpoint {str(folder)!r} cannot be read: {error.filename}: {error.strerror}. Check who may read it."
        ) from error


def _check_all(folder: Path, sizes: Mapping[str, int], hashes: Mapping[str, str] | None) -> None:
    for name, size in sizes.items():
        _check_file(folder, name, size=size, sha256=None if hashes is None else hashes[name])
    for part in _FOLDERS:
        for file in (folder / part).rglob("*"):
            name = file.relative_to(folder).as_posix()
            if name not in sizes and not file.is_dir() and not file.name.startswith("."):
                raise CheckpointError(
                    f"Checkpoint {str(folder)!r} holds {name}, which its manifest does not list. Remove this file."
                )


def _check_file(folder: Path, name: str, *, size: int, sha256: str | None) -> None:
    file, advice = folder / name, "Copy the folder again, or train again."
    if not file.is_file():
        raise CheckpointError(f"Checkpoint {str(folder)!r} is incomplete: {name} is missing. {advice}")
    if not _stays_inside(file, folder):
        raise CheckpointError(
            f"Checkpoint {str(folder)!r} holds {name} as a link to {str(file.resolve())!r}, outside of the folder. "
            "Copy that file into the folder."
        )
    actual = file.stat().st_size
    if actual != size:
        raise CheckpointError(
            f"Checkpoint {str(folder)!r} is incomplete: {name} has {actual} bytes instead of {size}. {advice}"
        )
    digest = None if sha256 is None else hash_file(file)
    if digest != sha256:
        raise CheckpointError(
            f"Checkpoint {str(folder)!r} was changed: {name} has sha256 {digest}, its manifest says {sha256}. {advice}"
        )


def _stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in the folder, or in the store of the hub's cache that a downloaded folder links to."""
    resolved, inside = file.resolve(), folder.resolve()
    store = [inside.parent.parent / "blobs"] if inside.parent.name == "snapshots" else []
    return any(resolved.is_relative_to(parent) for parent in (inside, *store))
