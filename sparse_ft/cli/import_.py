"""The command import."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sparse_ft.cli.options import OutputOption, parse_names, short_path


def import_(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA that PEFT saved.")],
    output: OutputOption,
    task: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help="Name for the task, a bundled task, or a task file.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Labels of the head's outputs, in order, if config.json lacks them."),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help="Backbone, if not the one that the adapter names.")
    ] = None,
) -> None:
    """Make a checkpoint of a LoRA that PEFT saved, with its head if the head is linear."""
    from sparse_ft.integrations.import_peft import import_adapter

    result = import_adapter(
        adapter, output=output, task=task, labels=parse_names("--labels", labels) if labels else [], backbone=backbone
    )
    serves = "serves no task" if result.task is None else f"serves task {result.task!r}"
    for line in (f"Imported expert {result.expert!r}, which {serves}.", *result.notes):
        typer.echo(line)
    path = short_path(result.path)
    typer.echo(f"\nCheckpoint: {path}\nNext: sparse-ft inspect {shlex.quote(path)}")
