"""The commands that make something new of checkpoints; cli.py lists them."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sparse_ft.options import (
    BackboneOption,
    CheckpointArgument,
    DataOption,
    DeviceOption,
    data_sources,
    named_path,
    named_rank,
    names,
    numbers,
    shown_path,
    two_names,
)

OutputOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write; must not hold anything.")]


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


def merge(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]PATH ...",
            help="Checkpoints, for all their experts; CHECKPOINT/experts/NAME, for one; or PEFT's LoRA.",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="stack keeps all experts. One of them make: linear, task_arithmetic, ties, dare, dare_ties, della, "
            "breadcrumbs, magnitude_prune, slerp, model_stock, cat, svd.",
        ),
    ],
    output: OutputOption,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,…", help="One an expert, in their order; default: all equal, sum 1.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of the entries that sparse methods keep; default 0.5.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Of the merged expert; default: the sum of the ranks.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of each delta's squared norm to keep, in place of a rank.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the merged expert; default merged.")] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="CHOICE", help="Of tasks with the same labels: average (default), the expert it is from, separate."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of what is dropped at random, and of the search; default 13.")
    ] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Score all tasks before and after.")] = False,
    split: Annotated[str | None, typer.Option(metavar="SPLIT", help="That --evaluate scores; default test.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Find weights and density on validation rows.")] = False,
    budget: Annotated[int | None, typer.Option(metavar="N", help="Trials of --search; default 20.")] = None,
    rows: Annotated[
        int | None, typer.Option(metavar="N", help="Validation rows of each task in a trial of --search; default 500.")
    ] = None,
    data: DataOption = None,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Merge the experts of checkpoints: side by side, or into one."""
    from sparse_ft.merging.merge import merge as merge_checkpoints

    result = merge_checkpoints(
        [named_path(entry) for entry in checkpoints],
        method=method,
        output=output,
        weights=None if weights is None else numbers("--weights", weights),
        density=density,
        rank=rank,
        energy=energy,
        name=name,
        heads=heads,
        seed=seed,
        evaluate=evaluate,
        split=split,  # type: ignore[arg-type]  # checked there
        search=search,
        budget=budget,
        rows=rows,
        data=data_sources(data),
        device=device or "auto",
        backbone=backbone,
    )
    typer.echo(result.to_text())
    shown = shown_path(result.path)
    typer.echo(f"\nCheckpoint: {shown}\nNext: sparse-ft evaluate {shlex.quote(shown)}")


def export(
    checkpoint: CheckpointArgument,
    format_: Annotated[str, typer.Option("--format", metavar="FORMAT", help="peft, transformers or onnx.")],
    output: OutputOption,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Only this task; without, all.")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="With onnx: a second graph with weights of eight bits, and what it loses.")
    ] = False,
    data: DataOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Write tasks for PEFT, transformers or onnxruntime, run what was written, and say how far its answers are."""
    from sparse_ft.integrations.export import export as export_checkpoint

    result = export_checkpoint(
        checkpoint, format=format_, output=output, task=task, int8=int8, data=data_sources(data), backbone=backbone
    )
    for name, found in result.differences.items():
        typer.echo(
            f"{name}: largest difference of a logit {found.largest:.1e} on {found.texts} texts; "
            f"{found.disagreements} of {found.answers} labels differ."
        )
    for name, scores in result.int8.items():
        typer.echo(
            f"{name}, {scores['split']}, {scores['rows']} rows: {scores['metric']} {scores['float32']:.4f} with "
            f"float32, {scores['int8']:.4f} with int8."
        )
    typer.echo(f"\nExport: {shown_path(result.path)}; its README.md shows how to use it.")


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
