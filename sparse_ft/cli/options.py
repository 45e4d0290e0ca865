"""Options that several commands share, and how their values are read."""

from pathlib import Path
from typing import Annotated

import typer

from sparse_ft.errors import ConfigError, DataError
from sparse_ft.paths import similar_path, user_path

TaskOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME_OR_PATH", help="Bundled task, or path of a task file. Repeatable."),
]
TaskNameOption = Annotated[
    list[str] | None, typer.Option("--task", metavar="NAME", help="Task of the checkpoint. Repeatable.")
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="[TASK=]PATH", help="Folder or file with the data; repeat with TASK= for several."),
]
DeviceOption = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")]
BackboneOption = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Folder of the backbone, if it has moved since training.")
]
CombineOption = Annotated[
    str | None,
    typer.Option(
        metavar="mix|average|vote",
        help="Let the experts of a task, or of tasks with the same labels, answer together: mix their deltas, average "
        "their probabilities, or take the majority.",
    ),
]
MinFamiliarityOption = Annotated[
    float | None,
    typer.Option(
        "--min-familiarity",
        metavar="SHARE",
        help="Share of your own texts that the gate turns away as unknown, with all that are stranger; 0 answers every "
        "text. Default: that of the checkpoint, 0.005.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-tasks", help="Let task files in a checkpoint name code (evaluate:...) and data on the hub."),
]
CheckpointArgument = Annotated[Path, typer.Argument(help="Folder that `train` wrote.")]
OutputOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write; must be empty or new.")]


def parse_two_names(option: str, value: str) -> tuple[str, str]:
    """Parse ``OLD=NEW``."""
    old, _, new = value.partition("=")
    if not old or not new:
        raise ConfigError(f"{option} {value!r} is not of the form OLD=NEW. Write e.g. {option} ner=names.")
    return old, new


def parse_label_names(value: str) -> tuple[str, str, str]:
    """Parse ``TASK:OLD=NEW``."""
    task, _, names = value.partition(":")
    old, _, new = names.partition("=")
    if not (task and old and new):
        raise ConfigError(
            f"--rename-label {value!r} is not of the form TASK:OLD=NEW. Write e.g. --rename-label sentiment:pos=good."
        )
    return task, old, new


def parse_named_path(value: str) -> tuple[str | None, str]:
    """Parse ``PATH`` or ``NAME=PATH``."""
    name, equals, path = value.partition("=")
    return (name, path) if equals and "/" not in name else (None, value)


def parse_named_rank(value: str) -> tuple[str, int]:
    """Parse ``NAME=RANK``."""
    name, _, rank = value.partition("=")
    if not name or not rank.isdecimal():
        raise ConfigError(f"--prune {value!r} is not of the form NAME=RANK. Write e.g. --prune ner=4.")
    return name, int(rank)


def parse_numbers(option: str, value: str) -> list[float]:
    """Parse ``0.5,0.5``."""
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {value!r} is no list of numbers. Write e.g. {option} 0.7,0.3.") from error


def parse_names(option: str, value: str) -> list[str]:
    """Parse ``A,B``, with or without spaces."""
    names = [part.strip() for part in value.split(",")]
    if not all(names):
        raise ConfigError(f"{option} {value!r} has an empty name. Write e.g. {option} A,B.")
    return names


def parse_sources(data: list[str] | None) -> str | dict[str, str] | None:
    """Parse ``--data PATH``, or ``--data TASK=PATH`` repeated; return one path, or task name to path."""
    from sparse_ft.tasks.spec import list_tasks, load_task

    if not data:
        return None
    bundled = list_tasks()
    sources: dict[str, str] = {}
    for value in data:
        task, equals, path = value.partition("=")
        if equals and (task in bundled or "/" not in task):
            name = load_task(task).name if task in bundled else task  # the task file clue/tnews names its task tnews
            if name in sources:
                raise ConfigError(f"--data names task {name!r} twice: {sources[name]} and {path}. Leave one out.")
            sources[name] = _existing(path)
        elif len(data) == 1:
            return _existing(value)
        else:
            raise ConfigError(f"--data {value!r} names no task. With several --data write TASK=PATH each time.")
    return sources


def _existing(source: str) -> str:
    """Return a path of data if there is such a file or folder; ``file.json#key`` is the list of a key in a file."""
    path, file = user_path(source), user_path(source.partition("#")[0])
    if path.exists() or file.exists() or file.with_name(f"{file.name}.gz").exists():
        return source
    advice = similar_path(path) or " Give the folder or file with the data."
    raise DataError(f"--data {source!r} does not exist.{advice}")


def short_path(path: Path) -> str:
    """Return a path relative to the current folder if it lies below that folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
