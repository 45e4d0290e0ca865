"""The command train."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparse_ft.cli.options import DataOption, DeviceOption, TaskOption, TrustOption, parse_sources, short_path
from sparse_ft.cli.streams import check_unicode_output

if TYPE_CHECKING:
    from sparse_ft.tasks.spec import TaskSpec
    from sparse_ft.training.train import TrainResult

BackboneOption = Annotated[str | None, typer.Option(metavar="NAME_OR_PATH", help="minilm, a folder, or a hub id.")]
ConfigOption = Annotated[
    str | None, typer.Option(metavar="NAME_OR_PATH", help="Bundled config, or YAML file of differences.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting. Repeatable.")
]
FromOption = Annotated[
    Path | None, typer.Option("--from", metavar="CHECKPOINT", help="Start from a checkpoint and keep its experts.")
]
StageOption = Annotated[
    Literal["experts", "gate", "joint", "shared"] | None,
    typer.Option(
        help="experts: experts, then the gate (default); gate: only the gate of --from; joint: both at once; shared: "
        "one expert for all tasks in the lower blocks, small ones of their own above."
    ),
]
OutputOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write; default runs/<tasks>.")]


def train(
    task: TaskOption = None,
    data: DataOption = None,
    backbone: BackboneOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    from_: FromOption = None,
    stage: StageOption = None,
    output: OutputOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --output.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of all random numbers.")] = None,
    device: DeviceOption = None,
    folds: Annotated[
        int | None,
        typer.Option(metavar="K", help="Test every row of one file once, over K folds; then train on all rows."),
    ] = None,
    trust_tasks: TrustOption = False,
) -> None:
    """Train one expert per task on a frozen backbone, and print the classification report."""
    check_unicode_output()
    _check_names(
        task or [], config=config, overrides=set_ or [], starts=from_ is not None or resume, has_data=bool(data)
    )
    sources = parse_sources(data)
    from sparse_ft.training.processes import rank
    from sparse_ft.training.train import train as train_experts

    try:
        result = train_experts(
            task or [],
            data=sources,
            output=output,
            backbone=backbone,
            config=config,
            overrides=set_ or [],
            from_checkpoint=from_,
            resume=resume,
            seed=seed,
            device=device,
            stage=stage,
            folds=folds,
            trust_tasks=trust_tasks,
        )
    except KeyboardInterrupt:
        typer.echo(
            "\nStopped. If a state was saved (every train.save_steps), `sparse-ft train --resume --output FOLDER` "
            "continues from it; FOLDER is the one named above.",
            err=True,
        )
        raise typer.Exit(130) from None
    if rank() == 0:
        _print_result(result, starts_from_checkpoint=from_ is not None)


def _check_names(tasks: list[str], *, config: str | None, overrides: list[str], starts: bool, has_data: bool) -> None:
    """Refuse unknown settings, unknown tasks and tasks without data before torch is loaded, which takes seconds.

    Args:
        tasks: Values of ``--task``.
        config: Value of ``--config``.
        overrides: Values of ``--set``.
        starts: Whether a checkpoint or an interrupted run may hold further tasks.
        has_data: Whether ``--data`` names data.
    """
    from sparse_ft.config import load_config
    from sparse_ft.tasks.spec import check_has_data, load_task

    run = load_config(config, overrides=overrides)
    for spec in [] if starts else map(load_task, tasks):
        if not has_data and spec.name not in run.sources:
            check_has_data(spec)


def _print_result(result: "TrainResult", *, starts_from_checkpoint: bool) -> None:
    """Print the scores, the folder of the checkpoint, and a command that uses it."""
    for task, entry in result.folds.items():
        typer.echo(entry.to_text(task) + "\n")
    if result.evaluation.tasks:
        typer.echo(result.evaluation.to_text())
    path = short_path(result.path)
    speed = f"Trained on {result.tokens_per_second:,.0f} tokens per second. " if result.history else ""
    typer.echo(f"\n{speed}Checkpoint: {path}")
    spec = next(iter(result.tasks.values()))
    example = _example(spec)
    dashes = "-- " if example.startswith("-") else ""
    # The gate may not know a new expert, and a task that reads another kind of row cannot answer the example.
    names_task = starts_from_checkpoint or len({other.reads for other in result.tasks.values()}) > 1
    task = f"--task {spec.name} " if names_task else ""
    typer.echo(f"Next: sparse-ft predict {shlex.quote(path)} {task}{dashes}{shlex.quote(example)}")


def _example(spec: "TaskSpec") -> str:
    """Return a line of input for the task, its own example if that is complete."""
    example = spec.example or "Your text here."
    if spec.reads == "pair" and "\t" not in example:
        return "Your first text here.\tYour second."
    if spec.reads == "choices" and not example.startswith("{"):
        return '{"text": "Your text here.", "text_pair": "Your question?", "choices": ["One.", "Another."]}'
    return example
