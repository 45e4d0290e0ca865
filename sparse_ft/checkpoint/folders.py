"""Write files and folders whole or not at all: staged beside the target, synced, renamed."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparse_ft.checkpoint.locks import check_locks, is_held, lock_of_the_dead, locked, locked_folders
from sparse_ft.errors import CheckpointError
from sparse_ft.json_output import json_text

_STAGED = ".new-"
"""Part of the name of a folder that is being filled, after that of the folder that it will be."""
NAME_ROOM = len("..new-12345678")
"""Bytes by which that name is longer than the folder's."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a complete file or none; see ``written_file``."""
    with written_file(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def written_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is written whole or not at all, and wait until the disk has it.

    A link stays, and its target is written. A path that is no regular file, such as ``/dev/stdout``, is written
    directly.
    """
    if path.parts[:2] == ("/", "dev") or (path.exists() and not path.is_file() and not path.is_dir()):
        with path.open("wb") as stream:
            yield stream
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.new")
    try:
        with staged.open("wb") as stream:
            yield stream
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
    write_bytes(path, (json_text(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Lock a folder that will be written, and remove the leftovers of killed processes in it and beside it.

    Args:
        target: Folder that need not exist; parents that it lacks are created, and removed if nothing is written.

    Raises:
        ConfigError: If another process has locked it.
        CheckpointError: If its parent may not be written.
    """
    with contextlib.ExitStack() as stack:
        with explain_os_errors(target):
            stack.enter_context(_with_parents(target))
            stack.enter_context(locked(target))
            recover_folder(target)
            _recover_neighbours(target.parent)
        yield


@contextlib.contextmanager
def _with_parents(target: Path) -> Iterator[None]:
    """Create the parents of a folder; remove in the end what is new and empty, the folder included."""
    missing = [folder for folder in (target, *target.parents) if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty
            for folder in missing:
                if folder.exists():
                    folder.rmdir()


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder and replace ``target`` with it; ``target`` is locked meanwhile, if it is not already.

    Args:
        target: Folder to create or replace; its parent is created.
        fill: Writes the content into the empty folder of its argument.

    Raises:
        ConfigError: If another process writes ``target``.
        CheckpointError: If the disk is full or the path is not writable; ``target`` is then as it was.
    """
    with contextlib.nullcontext() if is_held(target) else claimed(target), explain_os_errors(target):
        recover_folder(target)
        staged = _staged_path(target)
        staged.mkdir(parents=True)
        try:
            fill(staged)
            _open_to_readers(staged)
            _sync_folder(staged)
            check_locks()
            _swap(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Undo or finish a save that was killed, and remove its staged files. Only the holder of the lock may call this.

    A save that was killed between moving the old folder away and moving the new one in is undone. Where a folder
    stands, an old one is obsolete.
    """
    old = old_path(target)
    if old.is_dir():
        with contextlib.suppress(OSError):  # it is not empty, or does not exist
            target.rmdir()
        if target.exists():
            _discard(old, target)
        else:
            old.rename(target)
    for left in _staged_paths(target):
        shutil.rmtree(left, ignore_errors=True)


def _recover_neighbours(parent: Path) -> None:
    """Recover the other folders of a parent whose locks show that their writers were killed."""
    for target in locked_folders(parent):
        if is_held(target):
            continue
        with contextlib.suppress(OSError), lock_of_the_dead(target) as dead:  # it may belong to another user
            if dead:
                recover_folder(target)


def old_path(target: Path) -> Path:
    """Return where the old folder lies while a new one takes its name."""
    return target.with_name(f".{target.name}.old")


def is_leftover(path: Path, *, of: Path) -> bool:
    """Return whether a path is a folder that ``replace_folder`` stages."""
    return path.name.startswith(f".{of.name}{_STAGED}")


def _staged_path(target: Path) -> Path:
    """Return an unused path beside a folder, for staged files."""
    return target.with_name(f".{target.name}{_STAGED}{secrets.token_hex(4)}")


def _staged_paths(target: Path) -> Iterator[Path]:
    return target.parent.glob(f"{glob.escape(f'.{target.name}{_STAGED}')}*")


def _open_to_readers(folder: Path) -> None:
    """Give files the permissions of the umask; libraries that write through a temporary file make them private."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _discard(old: Path, target: Path) -> None:
    """Remove an old folder, under the name of a leftover first, so that a kill in between cannot bring it back."""
    rest = _staged_path(target)
    old.rename(rest)
    shutil.rmtree(rest, ignore_errors=True)


def _swap(staged: Path, target: Path) -> None:
    old = old_path(target)
    if target.exists():
        target.rename(old)
    staged.rename(target)
    with contextlib.suppress(OSError):  # the new folder is in place, whether or not its renaming is synced
        _sync_folder(target.parent)
    if old.exists():
        _discard(old, target)


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
