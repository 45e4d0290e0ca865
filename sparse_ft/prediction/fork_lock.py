"""Locks that are free in the child of a fork."""

import os
import threading
import weakref
from types import TracebackType

import torch


class ForkLock:
    """A lock for one thread at a time, as a context; a thread may enter it twice.

    A lock that another thread holds while the process forks would stay locked in the child forever.

    Args:
        waits: Whether ``os.fork`` waits until no thread holds it, so that the child has no model in the middle of a
            computation; if not, the child only gets a free lock.
    """

    def __init__(self, *, waits: bool = True) -> None:
        self.waits = waits
        self.renew()
        _LOCKS.add(self)

    def renew(self) -> None:
        """Replace the lock by a free one."""
        self._lock = threading.RLock()  # the thread that forks may hold it

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()


_LOCKS: weakref.WeakSet[ForkLock] = weakref.WeakSet()
_held: list[ForkLock] = []


def _before_fork() -> None:
    # In one order, because two threads may fork at once.
    locks = sorted((lock for lock in _LOCKS if lock.waits), key=id)
    for lock in locks:
        lock.__enter__()
    _held[:] = locks


def _after_fork_in_parent() -> None:
    held = _held.copy()
    _held.clear()  # before another thread that forks may fill it
    for lock in held:
        lock.__exit__(None, None, None)


def _after_fork_in_child() -> None:
    if _held:
        torch.set_num_threads(1)  # OpenMP's threads were not copied, and it would wait for them
    _held.clear()
    for lock in _LOCKS:
        lock.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
