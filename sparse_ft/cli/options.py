"""What the commands are given on the command line, and how it is read."""

from pathlib import Path
from typing import Annotated

import typer

from sparse_ft.errors import ConfigError

TaskOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME_OR_PATH", help="Bundled name, or path of a task file. Repeatable."),
]
TaskNameOption = Annotated[
    list[str] | None, typer.Option("--task", metavar="NAME", help="A task of the checkpoint. Repeatable.")
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="[TASK=]PATH", help="Folder or file of the data; with TASK= for several."),
]
DeviceOption = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")]
BackboneOption = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Where the backbone is now, if not where the checkpoint says.")
]
CombineOption = Annotated[
    str | None,
    typer.Option(
        metavar="mix|average|vote",
        help="One answer of the experts of a task, and of tasks with the same labels: mixed, averaged or by majority.",
    ),
]
CheckpointArgument = Annotated[Path, typer.Argument(help="Folder that `train` wrote.")]


def two_names(option: str, entry: str) -> tuple[str, str]:
    """Read ``OLD=NEW``."""
    old, _, new = entry.partition("=")
    if not old or not new:
        raise ConfigError(f"{option} {entry!r} is not of the form OLD=NEW. Write e.g. {option} ner=names.")
    return old, new


def named_path(entry: str) -> tuple[str | None, str]:
    """Read ``PATH`` or ``NAME=PATH``."""
    name, equals, path = entry.partition("=")
    return (name, path) if equals and "/" not in name else (None, entry)


def named_rank(entry: str) -> tuple[str, int]:
    """Read ``NAME=RANK``."""
    name, _, rank = entry.partition("=")
    if not name or not rank.isdecimal():
        raise ConfigError(f"--prune {entry!r} is not of the form NAME=RANK. Write e.g. --prune ner=4.")
    return name, int(rank)


def numbers(option: str, entry: str) -> list[float]:
    """Read ``0.5,0.5``."""
    try:
        return [float(part) for part in entry.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {entry!r} is no list of numbers. Write e.g. {option} 0.7,0.3.") from error


def names(option: str, entry: str) -> list[str]:
    """Read ``A,B``, with or without spaces."""
    found = [part.strip() for part in entry.split(",")]
    if not all(found):
        raise ConfigError(f"{option} {entry!r} has an empty name. Write e.g. {option} A,B.")
    return found


def data_sources(data: list[str] | None) -> str | dict[str, str] | None:
    """Read ``--data PATH`` and ``--data TASK=PATH``."""
    from sparse_ft.tasks.spec import list_tasks, load_task

    if not data:
        return None
    named: dict[str, str] = {}
    for entry in data:
        task, equals, path = entry.partition("=")
        if equals and (task in list_tasks() or "/" not in task):
            name = load_task(task).name if task in list_tasks() else task  # clue/tnews is named without the slash
            if name in named:
                raise ConfigError(f"--data names task {name!r} twice: {named[name]} and {path}. Leave one out.")
            named[name] = path
        elif len(data) == 1:
            return entry
        else:
            raise ConfigError(f"--data {entry!r} names no task. With several --data write TASK=PATH each time.")
    return named


def shown_path(path: Path) -> str:
    """Show a path below the current folder as the user would type it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


OutputOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write; must not hold anything.")]
