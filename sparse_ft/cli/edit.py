"""The commands that make something new of checkpoints; cli.py lists them."""

import shlex
from typing import Annotated

import typer

from sparse_ft.cli.options import (
    BackboneOption,
    CheckpointArgument,
    OutputOption,
    named_path,
    named_rank,
    shown_path,
    two_names,
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
    copy: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Copy an expert and its task. Repeatable.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Add the experts of a checkpoint, one of them (CHECKPOINT/experts/NAME), or PEFT's LoRA. Repeatable.",
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
    """Remove, rename, copy, add, prune and split experts, in this order, and write a new checkpoint."""
    from sparse_ft.merging.edit import edit as edit_checkpoint

    result = edit_checkpoint(
        checkpoint,
        output=output,
        remove=remove or [],
        rename=[two_names("--rename", entry) for entry in rename or []],
        copy=[two_names("--copy", entry) for entry in copy or []],
        add=[named_path(entry) for entry in add or []],
        prune=[named_rank(entry) for entry in prune or []],
        split=[two_names("--split", entry) for entry in split or []],
        backbone=backbone,
    )
    for line in result.changes:
        typer.echo(line)
    shown = shown_path(result.path)
    typer.echo(f"\nCheckpoint: {shown}\nNext: sparse-ft inspect {shlex.quote(shown)}")
