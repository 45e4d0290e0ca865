"""The command distill."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sparse_ft.cli.options import (
    DataOption,
    DeviceOption,
    TrustOption,
    parse_sources,
    short_path,
)
from sparse_ft.cli.streams import check_unicode_output
from sparse_ft.cli.train import ConfigOption, SetOption

PathsArgument = Annotated[list[Path], typer.Argument(metavar="CHECKPOINT ...", help="Folders whose experts teach.")]
OutputOption = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="Folder to write; empty or new, or that of the run to resume.")
]
TaskOption = Annotated[
    list[str] | None, typer.Option("--task", metavar="NAME", help="Task to distil; default all. Repeatable.")
]
BackboneOption = Annotated[
    str | None, typer.Option(metavar="NAME_OR_PATH", help="Another backbone than that of the teachers.")
]
PassesOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Passes that all answers to one text may cost; default 1.5. With 1: heads only."),
]


def distill(
    checkpoints: PathsArgument,
    output: OutputOption,
    passes: PassesOption = None,
    task: TaskOption = None,
    data: DataOption = None,
    backbone: BackboneOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --output.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of all random numbers.")] = None,
    device: DeviceOption = None,
    trust_tasks: TrustOption = False,
) -> None:
    """Distil the experts of single tasks into one shared expert with small ones on top: all answers in fewer passes."""
    check_unicode_output()
    from sparse_ft.training.distill import distill as distill_checkpoints
    from sparse_ft.training.processes import rank

    result = distill_checkpoints(
        checkpoints,
        output=output,
        passes=passes,
        tasks=task or [],
        data=parse_sources(data),
        backbone=backbone,
        config=config,
        overrides=set_ or [],
        resume=resume,
        seed=seed,
        device=device,
        trust_tasks=trust_tasks,
    )
    if rank() == 0:
        path = short_path(result.path)
        typer.echo(result.to_text())
        typer.echo(f"\nCheckpoint: {path}\nNext: sparse-ft evaluate {shlex.quote(path)}")
