"""The command tasks."""

from typing import Annotated

import typer


def tasks(name: Annotated[str | None, typer.Argument(help="Bundled task, or path of a task file.")] = None) -> None:
    """List the bundled tasks, or show one with its data source, labels and example."""
    from sparse_ft.cli.listing import describe_task, describe_tasks

    typer.echo(describe_task(name) if name else describe_tasks())
