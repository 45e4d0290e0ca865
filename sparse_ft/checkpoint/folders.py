"""Write files and folders whole or not at all: staged beside the target, synced, renamed."""

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparse_ft.errors import CheckpointError

_LEFTOVER_SECONDS = 86_400
"""Age from which a staged folder is a leftover of a killed process."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and wait until the disk has it; a link stays, and its target is written.

    A path that is no regular file, such as ``/dev/stdout``, is written directly.
    """
    if path.parts[:2] == ("/", "dev") or (path.exists() and not path.is_file() and not path.is_dir()):
        path.write_bytes(content)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.new")
    try:
        with staged.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def damaged(file: Path, problem: str) -> CheckpointError:
    """Return the error for a file of a checkpoint whose content is wrong."""
    return CheckpointError(
        f"{str(file)!r} is damaged: {problem.rstrip('.')}. Restore the folder from a copy or train again."
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, and wait until the disk has it."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder and replace ``target`` with it.

    Args:
        target: Folder to create or replace; its parent is created.
        fill: Writes the content into the empty folder of its argument.

    Raises:
        CheckpointError: If the disk is full or the path is not writable; ``target`` is then as it was.
    """
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        _remove_leftovers(target)
        staged = Path(tempfile.mkdtemp(prefix=_staged_prefix(target), dir=target.parent))
        try:
            staged.chmod(0o755)
            fill(staged)
            _sync_folder(staged)
            _swap(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Restore the old folder if a save was killed between moving it away and moving the new one in."""
    old = _old_path(target)
    if old.is_dir() and not target.exists():
        old.rename(target)


def _remove_leftovers(target: Path) -> None:
    """Remove folders that killed processes staged for ``target``; young ones may belong to a running process."""
    for left in target.parent.glob(f"{glob.escape(_staged_prefix(target))}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _staged_prefix(target: Path) -> str:
    return f".{target.name}.new-"


def _old_path(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _swap(staged: Path, target: Path) -> None:
    old = _old_path(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staged.rename(target)
    with contextlib.suppress(OSError):  # the new folder is in place, whether or not its renaming is synced
        _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors while ``path`` is written into a CheckpointError.

    Args:
        path: File or folder that is written.

    Raises:
        CheckpointError: If the disk is full, the path may not be written, or a file stands in the way.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be written: {_reason(error, path)}") from error
    except Exception as error:
        if "os error 28" not in str(error):  # the tokenizers library is written in Rust and raises a bare Exception
            raise
        raise CheckpointError(f"{str(path)!r} cannot be written: {_disk_full(path)}") from error


def _reason(error: OSError, path: Path) -> str:
    file = error.filename or path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no write permission ({file}). Choose another folder."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{file} is a file, not a folder. Choose another folder."
    return f"{error.strerror or error}."


def _disk_full(path: Path) -> str:
    free = shutil.disk_usage(_existing_parent(path)).free // 2**20
    return f"no space left on the disk ({free} MiB free). Free some and try again."


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
