"""The command merge."""

import shlex
from typing import Annotated

import typer

from sparse_ft.cli.options import (
    BackboneOption,
    DataOption,
    DeviceOption,
    OutputOption,
    TrustOption,
    parse_named_path,
    parse_numbers,
    parse_sources,
    short_path,
)

PathsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]PATH ...",
        help="A checkpoint with all its experts, one expert (CHECKPOINT/experts/NAME), or a LoRA of PEFT.",
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        help="stack keeps all experts. The others make one expert: linear, task_arithmetic, ties, dare, dare_ties, "
        "della, breadcrumbs, magnitude_prune, slerp, model_stock, cat, svd.",
    ),
]
WeightsOption = Annotated[
    str | None, typer.Option(metavar="W,W,…", help="Weight of each expert, in order; default: equal weights, sum 1.")
]
DensityOption = Annotated[
    float | None, typer.Option(metavar="SHARE", help="Share of the entries that sparse methods keep; default 0.5.")
]
RankOption = Annotated[
    int | None, typer.Option(metavar="N", help="Rank of the merged expert; default: the sum of the ranks.")
]
EnergyOption = Annotated[
    float | None, typer.Option(metavar="SHARE", help="Share of each delta's squared norm to keep, in place of a rank.")
]
NameOption = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the merged expert; default merged.")]
HeadsOption = Annotated[
    str | None,
    typer.Option(
        metavar="CHOICE",
        help="Head of tasks with the same labels: average (default), the expert that gives it, or separate.",
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of the entries dropped at random and of the search; default 13.")
]
SplitOption = Annotated[str | None, typer.Option(metavar="SPLIT", help="Split for --evaluate; default test.")]
BudgetOption = Annotated[int | None, typer.Option(metavar="N", help="Trials of --search; default 20.")]
RowsOption = Annotated[
    int | None, typer.Option(metavar="N", help="Validation rows of each task in a trial of --search; default 500.")
]


def merge(
    checkpoints: PathsArgument,
    method: MethodOption,
    output: OutputOption,
    weights: WeightsOption = None,
    density: DensityOption = None,
    rank: RankOption = None,
    energy: EnergyOption = None,
    name: NameOption = None,
    heads: HeadsOption = None,
    seed: SeedOption = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Score all tasks before and after.")] = False,
    split: SplitOption = None,
    search: Annotated[bool, typer.Option("--search", help="Find weights and density on validation rows.")] = False,
    budget: BudgetOption = None,
    rows: RowsOption = None,
    data: DataOption = None,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
    trust_tasks: TrustOption = False,
) -> None:
    """Merge the experts of checkpoints: side by side, or into one."""
    from sparse_ft.merging.merge import merge as merge_checkpoints

    result = merge_checkpoints(
        [parse_named_path(value) for value in checkpoints],
        method=method,
        output=output,
        weights=None if weights is None else parse_numbers("--weights", weights),
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
        data=parse_sources(data),
        device=device or "auto",
        backbone=backbone,
        trust_tasks=trust_tasks,
    )
    typer.echo(result.to_text())
    path = short_path(result.path)
    typer.echo(f"\nCheckpoint: {path}\nNext: sparse-ft evaluate {shlex.quote(path)}")
