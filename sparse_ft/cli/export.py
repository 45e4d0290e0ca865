"""The command export."""

from typing import Annotated

import typer

from sparse_ft.cli.options import (
    BackboneOption,
    CheckpointArgument,
    DataOption,
    OutputOption,
    TrustOption,
    parse_sources,
    short_path,
)


def export(
    checkpoint: CheckpointArgument,
    format_: Annotated[str, typer.Option("--format", metavar="FORMAT", help="peft, transformers, multitask or onnx.")],
    output: OutputOption,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Task to export; default: all.")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="With onnx: add a graph with 8-bit weights and score what it loses.")
    ] = False,
    data: DataOption = None,
    backbone: BackboneOption = None,
    trust_tasks: TrustOption = False,
) -> None:
    """Write tasks for PEFT, transformers or onnxruntime, run the export, and compare its answers."""
    from sparse_ft.integrations.export import export as export_checkpoint

    result = export_checkpoint(
        checkpoint,
        format=format_,
        output=output,
        task=task,
        int8=int8,
        data=parse_sources(data),
        backbone=backbone,
        trust_tasks=trust_tasks,
    )
    for name, difference in result.differences.items():
        typer.echo(
            f"{name}: largest difference of a logit {difference.largest:.1e} on {difference.texts} texts; "
            f"{difference.disagreements} of {difference.answers} labels differ."
        )
    for name, scores in result.int8.items():
        typer.echo(
            f"{name}, {scores['split']}, {scores['rows']} rows: {scores['metric']} {scores['float32']:.4f} with "
            f"float32, {scores['int8']:.4f} with int8."
        )
    typer.echo(f"\nExport: {short_path(result.path)}; its README.md shows how to use it.")
