"""The folder that a command writes: new or empty, so that nothing is lost."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from sparse_ft.checkpoint.folders import explain_os_errors, recover_folder
from sparse_ft.checkpoint.manifest import MANIFEST
from sparse_ft.errors import ConfigError


def default_output(names: Sequence[str]) -> Path:
    """Return the folder of a run without --output: runs/ and the names of its tasks, or their number above four."""
    return Path("runs") / ("-".join(names) if len(names) <= 4 else f"{len(names)}-tasks")


def next_output(names: Sequence[str]) -> Path:
    """Create the first default folder of these tasks that does not exist, before another run can take it."""
    base = default_output(names).absolute()
    number, folder = 1, base
    with explain_os_errors(base):
        base.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                folder = base.with_name(f"{base.name}-{number}")
            else:
                return folder


def give_back(output: Path) -> None:
    """Remove the folder that ``next_output`` created, if it is still empty."""
    with contextlib.suppress(OSError):  # it is not empty, or does not exist
        output.rmdir()
        output.parent.rmdir()


def free_output(output: str | Path) -> Path:
    """Return the absolute path of a folder that is empty or does not exist, with links resolved.

    Raises:
        ConfigError: If it is a file or not empty.
    """
    folder = Path(output).expanduser().resolve()
    recover_folder(folder)
    recover_folder(folder / "resume")
    if (folder / MANIFEST).exists():
        problem = "holds a checkpoint already. Choose another --output, or move the old one away."
    elif (folder / "resume").exists():
        problem = "holds an unfinished run. Add --resume to continue it, or choose another --output."
    elif folder.is_file():
        problem = "is a file, not a folder. Choose another --output."
    elif folder.is_dir() and any(folder.iterdir()):
        problem = "is not empty and no checkpoint. Choose another --output."
    else:
        return folder
    raise ConfigError(f"{str(output)!r} {problem}")
