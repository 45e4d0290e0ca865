"""Locks on folders that are written, so that one process at a time writes a folder.

The lock of ``NAME`` is the operating system's (``flock``) on the file ``.NAME.lock`` beside it, so it ends with its
process, however that ends. The file names the process, for the messages of others.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_ft.errors import CheckpointError, ConfigError

_HELD: dict[Path, int] = {}
"""Folders that this process has locked, with the descriptor of each lock file."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
"""Errors of file systems without locks; there only the content of the lock file shows which process writes."""

_PATIENCE = 1.0
"""Seconds to wait for a lock: another process may hold it so long to remove the files of a killed one."""


def lock_file(folder: Path) -> Path:
    """Return the lock file of a folder."""
    return folder.with_name(f".{folder.name}.lock")


def locked_folders(parent: Path) -> list[Path]:
    """Return the folders beside which processes have left their locks, or still hold them."""
    files = (file for file in parent.glob(".*.lock") if _read(file))
    return [file.with_name(file.name[1 : -len(".lock")]) for file in files]


def is_held(folder: Path) -> bool:
    """Return whether this process has locked a folder, or one that it lies in."""
    return any(place in _HELD for place in (folder, *folder.parents))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, which need not exist, in an existing one.

    Raises:
        ConfigError: If another process, or another call in this one, has locked it.
    """
    file = lock_file(folder)
    descriptor = _wait_for(file)
    if descriptor is None:
        raise _busy(folder)
    _HELD[folder] = descriptor
    try:
        yield
    finally:
        del _HELD[folder]
        _release(file, descriptor)


@contextlib.contextmanager
def lock_of_the_dead(folder: Path) -> Iterator[bool]:
    """Take over the lock of a folder if the process that made it is gone; yield whether it was."""
    file = lock_file(folder)
    descriptor = _acquire(file) if file.is_file() else None
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(file, descriptor)


def check_unlocked(folder: Path) -> None:
    """Refuse a folder that another process has locked.

    Raises:
        ConfigError: With the name of that process.
    """
    if is_held(folder) or not lock_file(folder).exists():
        return
    with lock_of_the_dead(folder) as dead:
        if not dead and lock_file(folder).exists():
            raise _busy(folder)


def _busy(folder: Path) -> ConfigError:
    return ConfigError(
        f"{str(folder)!r} is being written by {_holder(lock_file(folder))}. Wait until that ends, or choose another "
        "--output."
    )


def check_locks() -> None:
    """Refuse to go on if a lock of this process was removed or taken: another process may write the folder now.

    Raises:
        CheckpointError: With the folder's name.
    """
    for folder, descriptor in list(_HELD.items()):  # another thread may lock and release meanwhile
        file = lock_file(folder)
        if not _is_ours(file, descriptor):
            raise CheckpointError(
                f"{str(folder)!r} was taken over by {_holder(file)} while this process was writing it: the lock "
                f"{file.name!r} was removed. Nothing there is overwritten; write to another folder."
            )


def _wait_for(file: Path) -> int | None:
    deadline = time.monotonic() + _PATIENCE
    while (descriptor := _acquire(file)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return descriptor


def _acquire(file: Path) -> int | None:
    """Lock a file, which is created, and note this process in it; return None if another one has it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(descriptor)
            if locked and _same_file(file, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _this_process(), 0)
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not locked:
            return None  # else its holder removed it meanwhile


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _may_live(_read(descriptor))
    return True


def _release(file: Path, descriptor: int) -> None:
    if _is_ours(file, descriptor):
        file.unlink(missing_ok=True)
    os.close(descriptor)


def _is_ours(file: Path, descriptor: int) -> bool:
    return _same_file(file, descriptor) and _read(descriptor).get("pid") == os.getpid()


def _same_file(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _this_process() -> bytes:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()


def _read(file: Path | int) -> dict[str, Any]:
    """Return the process that a lock file names; nothing while it is being written, or if it is no lock."""
    try:
        with open(file, "rb", closefd=isinstance(file, Path)) as stream:
            stream.seek(0)
            content = json.loads(stream.read(4096))
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(content, dict) and content.keys() == {"pid", "host"} and isinstance(content["pid"], int)
    return content if ours else {}


def _holder(file: Path) -> str:
    """Name the process that a lock file names."""
    content = _read(file)
    return f"process {content['pid']} on {content['host']}" if content else "another process"


def _may_live(process: Mapping[str, Any]) -> bool:
    """Return whether the process that a lock file names runs, as far as can be known here."""
    if process.get("host") != socket.gethostname():
        return bool(process)
    try:
        os.kill(int(process["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(process["pid"]) != os.getpid()


def _forget_locks() -> None:
    """Leave the locks to the parent process after a fork."""
    for descriptor in _HELD.values():
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_locks)
