"""The command import."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sparse_ft.cli.edit import OutputOption
from sparse_ft.cli.options import (
    names,
    shown_path,
)


def import_(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA that PEFT saved.")],
    output: OutputOption,
    task: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help="The task's name here, a bundled one, or a task file.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Names of the head's outputs, in its order, if not in config.json."),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help="The backbone, if not where the adapter says.")
    ] = None,
) -> None:
    """Make a checkpoint of a LoRA that PEFT saved, with its head where it can be understood."""
    from sparse_ft.integrations.import_peft import import_adapter

    result = import_adapter(
        adapter, output=output, task=task, labels=names("--labels", labels) if labels else [], backbone=backbone
    )
    serves = "serves no task" if result.task is None else f"serves task {result.task!r}"
    for line in (f"Imported expert {result.expert!r}, which {serves}.", *result.notes):
        typer.echo(line)
    shown = shown_path(result.path)
    typer.echo(f"\nCheckpoint: {shown}\nNext: sparse-ft inspect {shlex.quote(shown)}")
