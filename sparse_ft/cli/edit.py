"""The command edit."""

import shlex
from typing import Annotated

import typer

from sparse_ft.cli.options import (
    BackboneOption,
    CheckpointArgument,
    OutputOption,
    parse_label_names,
    parse_named_path,
    parse_named_rank,
    parse_two_names,
    short_path,
)


def edit(
    checkpoint: CheckpointArgument,
    output: OutputOption,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Remove an expert and its tasks. Repeatable.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Rename an expert; its tasks keep their names. Repeatable."),
    ] = None,
    rename_task: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Rename a task; its expert keeps its name. Repeatable.")
    ] = None,
    rename_label: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK:OLD=NEW", help="Rename a label, or a type of entities, of a task. Repeatable."),
    ] = None,
    copy: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Copy an expert and its task. Repeatable.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Add a checkpoint, one of its experts (CHECKPOINT/experts/NAME), or a LoRA of PEFT. Repeatable.",
        ),
    ] = None,
    prune: Annotated[
        list[str] | None, typer.Option(metavar="NAME=RANK", help="Lower the rank of an expert. Repeatable.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NEW", help="Give half of a task's texts to a copy of its expert. Repeatable."),
    ] = None,
    backbone: BackboneOption = None,
) -> None:
    """Remove and rename experts, rename tasks and labels, copy, add, prune and split experts, in this order.

    The result is a new checkpoint.
    """
    from sparse_ft.merging.edit import edit as edit_checkpoint

    result = edit_checkpoint(
        checkpoint,
        output=output,
        remove=remove or [],
        rename=[parse_two_names("--rename", value) for value in rename or []],
        rename_task=[parse_two_names("--rename-task", value) for value in rename_task or []],
        rename_label=[parse_label_names(value) for value in rename_label or []],
        copy=[parse_two_names("--copy", value) for value in copy or []],
        add=[parse_named_path(value) for value in add or []],
        prune=[parse_named_rank(value) for value in prune or []],
        split=[parse_two_names("--split", value) for value in split or []],
        backbone=backbone,
    )
    for line in result.changes:
        typer.echo(line)
    path = short_path(result.path)
    typer.echo(f"\nCheckpoint: {path}\nNext: sparse-ft inspect {shlex.quote(path)}")
