"""Paths as users write them."""

import contextlib
import difflib
import os
from pathlib import Path

from sparse_ft.errors import ConfigError

_PART_BYTES = 255
"""Longest name of a file or folder that usual file systems allow."""
_PATH_BYTES = 3_800
"""Longest path of an output: systems allow 4,096 bytes, and the files inside have names, too."""


def user_path(path: str | Path) -> Path:
    """Return a path with ``~`` replaced by the home folder; nothing is read.

    Raises:
        ConfigError: If it can be no path: an unknown user, a name too long, or characters that no name has.
    """
    try:
        expanded = Path(path).expanduser()
        parts = [len(part.encode()) for part in expanded.parts]
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise ConfigError(
            f"{str(path)!r} begins with {user!r}, and there is no such user. Write the folder."
        ) from error
    except UnicodeEncodeError as error:
        raise ConfigError(f"{str(path)!r} is not UTF-8. Give the file or folder a name in UTF-8.") from error
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r} holds a NUL character, which no path can. Write the path without it.")
    if max(parts, default=0) > _PART_BYTES:
        raise ConfigError(
            f"{str(path)[:60] + '…'!r} has a name of {max(parts)} bytes; a name has at most {_PART_BYTES}. Shorten it."
        )
    return expanded


def similar_path(path: Path, *folders: Path) -> str:
    """Word a suggestion for a path that does not exist.

    Args:
        path: The path.
        folders: Folders to search after the folder of the path.

    Returns:
        `` Did you mean …?`` with the closest name of a file or folder; an empty string if no name is close.
    """
    by_name: dict[str, Path] = {}
    for folder in (path.parent, *folders):
        with contextlib.suppress(OSError):  # the folder does not exist, or may not be read
            for entry in sorted(folder.iterdir()):
                if entry != path and not entry.name.startswith("."):
                    by_name.setdefault(entry.name, entry)
    close = difflib.get_close_matches(path.name, by_name, n=1, cutoff=0.6)
    return f" Did you mean {str(by_name[close[0]])!r}?" if close else ""


def output_path(path: str | Path, *, room: int) -> Path:
    """Return the absolute path of a file or folder that will be written, with links resolved.

    Args:
        path: It need not exist.
        room: Bytes that names beside it are longer than its own name.

    Raises:
        ConfigError: If nothing can be written there: its name is too long, or links lead in a circle.
    """
    folder = user_path(os.path.realpath(user_path(path)))
    try:
        folder.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        files = [str(parent) for parent in folder.parents if parent.is_file()]
        reason = f"{files[0]} is a file, not a folder" if files else error.strerror
        raise ConfigError(f"{str(path)!r} cannot be written: {reason}. Choose another.") from error
    name, whole = len(folder.name.encode()), len(str(folder).encode())
    if name + room > _PART_BYTES:
        most = _PART_BYTES - room
        raise ConfigError(
            f"{str(path)[:60] + '…'!r} has a name of {name} bytes; what is written has at most {most}. Shorten it."
        )
    if whole > _PATH_BYTES:
        raise ConfigError(
            f"{str(path)[:60] + '…'!r} is a path of {whole} bytes; what is written has at most {_PATH_BYTES}. "
            "Shorten it."
        )
    return folder
