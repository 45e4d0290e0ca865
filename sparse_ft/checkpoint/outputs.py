"""Which folder a command may write: one in which nothing would be lost."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from sparse_ft.checkpoint.folders import explain_os_errors, recover_folder
from sparse_ft.checkpoint.manifest import MANIFEST
from sparse_ft.errors import ConfigError


def default_output(names: Sequence[str]) -> Path:
    """Name the folder of a run after its tasks."""
    return Path("runs") / ("-".join(names) if len(names) <= 4 else f"{len(names)}-tasks")


def next_output(names: Sequence[str]) -> Path:
    """Make the next default folder of these tasks that does not exist, so that no run beside takes it, too."""
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
    """Remove what ``next_output`` made, if nothing was written into it."""
    with contextlib.suppress(OSError):  # it is not empty, or not there
        output.rmdir()
        output.parent.rmdir()


def free_output(output: str | Path) -> Path:
    """Return the absolute path of a folder that is empty or does not exist; where a link leads, not the link.

    Raises:
        ConfigError: If something is there.
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
