"""The command export."""

from typing import Annotated

import typer

from sparse_ft.cli.edit import OutputOption
from sparse_ft.cli.options import BackboneOption, CheckpointArgument, DataOption, data_sources, shown_path


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
