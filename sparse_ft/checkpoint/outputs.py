"""The folder that a command writes: new or empty, so that nothing is lost, and locked against other commands."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparse_ft.checkpoint.folders import NAME_ROOM, claimed, is_leftover, old_path, recover_folder
from sparse_ft.checkpoint.locks import check_unlocked
from sparse_ft.checkpoint.manifest import MANIFEST
from sparse_ft.errors import ConfigError
from sparse_ft.paths import output_path

_RESUME = "resume"
"""Folder of an unfinished run in its output folder."""


def default_output(names: Sequence[str]) -> Path:
    """Return the folder of a run without --output: runs/ and the names of its tasks, or their number above four."""
    return Path("runs") / ("-".join(names) if len(names) <= 4 else f"{len(names)}-tasks")


@contextlib.contextmanager
def claimed_default(names: Sequence[str]) -> Iterator[Path]:
    """Claim the first default folder of these tasks that does not exist and that no other run has claimed."""
    base = output_path(default_output(names), room=NAME_ROOM)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if folder.exists() or old_path(folder).exists():
            continue
        with contextlib.ExitStack() as claim:
            try:
                claim.enter_context(claimed(folder))
            except ConfigError:  # another run has it
                continue
            if not folder.exists():
                yield folder
                return


@contextlib.contextmanager
def claimed_output(output: str | Path) -> Iterator[Path]:
    """Claim a folder that is empty or does not exist, for as long as a command runs.

    Args:
        output: The folder; the absolute path that is yielded has links resolved.

    Raises:
        ConfigError: If it is a file, not empty, or being written by another command.
        CheckpointError: If it may not be written.
    """
    with claimed_run(output):
        yield free_output(output)


@contextlib.contextmanager
def claimed_run(output: str | Path) -> Iterator[Path]:
    """Claim the folder of a run, whatever it holds, and undo a save that was killed.

    Raises:
        ConfigError: If it is being written by another command.
        CheckpointError: If it may not be written.
    """
    folder = output_path(output, room=NAME_ROOM)
    with claimed(folder):
        recover_folder(folder / _RESUME)
        yield folder


def free_output(output: str | Path) -> Path:
    """Return the absolute path of a folder that is empty or does not exist, apart from leftovers of killed saves.

    Raises:
        ConfigError: If it is a file, not empty, being written by another command, or one that cannot be replaced.
    """
    folder = output_path(output, room=NAME_ROOM)
    check_unlocked(folder)
    entries = _entries(folder) or _entries(old_path(folder))
    if MANIFEST in entries:
        problem = "holds a checkpoint already. Choose another --output, or move the old one away."
    elif _RESUME in entries or old_path(Path(_RESUME)).name in entries:
        problem = "holds an unfinished run. Add --resume to continue it, or choose another --output."
    elif folder.is_file():
        problem = "is a file, not a folder. Choose another --output."
    elif entries:
        problem = "is not empty and no checkpoint. Choose another --output."
    elif folder.is_mount() or Path.cwd().is_relative_to(folder):
        what = "a mount point" if folder.is_mount() else "the current folder, or holds it"
        problem = f"is {what}, which no new folder can replace. Choose a folder inside it."
    else:
        return folder
    raise ConfigError(f"{str(output)!r} {problem}")


def _entries(folder: Path) -> set[str]:
    """List the names in a folder, without the staged files of a killed save of a run's state."""
    if not folder.is_dir():
        return set()
    return {entry.name for entry in folder.iterdir() if not is_leftover(entry, of=folder / _RESUME)}
