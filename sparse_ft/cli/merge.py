"""The command merge."""

import shlex
from typing import Annotated

import typer

from sparse_ft.cli.edit import OutputOption
from sparse_ft.cli.options import (
    BackboneOption,
    DataOption,
    DeviceOption,
    data_sources,
    named_path,
    numbers,
    shown_path,
)


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
