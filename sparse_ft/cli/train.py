"""The command train."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparse_ft.cli.options import DataOption, DeviceOption, TaskOption, data_sources, shown_path

if TYPE_CHECKING:
    pass


def train(
    task: TaskOption = None,
    data: DataOption = None,
    backbone: Annotated[str | None, typer.Option(metavar="NAME_OR_PATH", help="minilm, a folder, or a hub id.")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help="Bundled name, or YAML file of differences.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting. Repeatable.")
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="CHECKPOINT", help="Start from a checkpoint and keep its experts.")
    ] = None,
    stage: Annotated[
        Literal["experts", "gate", "joint"] | None,
        typer.Option(help="experts, then the gate among them (default); the gate of --from alone; or both jointly."),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write; default runs/<tasks>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --output.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of everything random.")] = None,
    device: DeviceOption = None,
) -> None:
    """Train one expert per task on a frozen backbone, and print the classification report."""
    from sparse_ft.training.processes import place
    from sparse_ft.training.train import train as train_experts

    try:
        result = train_experts(
            task or [],
            data=data_sources(data),
            output=output,
            backbone=backbone,
            config=config,
            overrides=set_ or [],
            from_checkpoint=from_,
            resume=resume,
            seed=seed,
            device=device,
            stage=stage,
        )
    except KeyboardInterrupt:
        typer.echo(
            "\nStopped. If a state was saved (every train.save_steps), `sparse-ft train --resume --output FOLDER` goes "
            "on from it; FOLDER is the one named above.",
            err=True,
        )
        raise typer.Exit(130) from None
    if place() > 0:  # of several processes one speaks
        return
    typer.echo(result.evaluation.to_text())
    shown = shown_path(result.path)
    spec = next(iter(result.tasks.values()))
    example = spec.example or "Your text here."
    if spec.reads == "pair" and "\t" not in example:
        example = "Your first text here.\tYour second."
    if spec.reads == "choices" and not example.startswith("{"):
        example = '{"text": "Your text here.", "text_pair": "Your question?", "choices": ["One.", "Another."]}'
    speed = f"Trained on {result.tokens_per_second:,.0f} tokens per second. " if result.history else ""
    typer.echo(f"\n{speed}Checkpoint: {shown}")
    dashes = "-- " if example.startswith("-") else ""
    # Whatever its gate knows of new experts; and a task that reads something else could not answer the example.
    by_name = from_ is not None or len({other.reads for other in result.tasks.values()}) > 1
    named = f"--task {spec.name} " if by_name else ""
    typer.echo(f"Next: sparse-ft predict {shlex.quote(shown)} {named}{dashes}{shlex.quote(example)}")
