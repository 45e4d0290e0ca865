"""The command inspect."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from sparse_ft.cli.options import BackboneOption, CheckpointArgument, DeviceOption, MinFamiliarityOption, short_path
from sparse_ft.errors import ConfigError
from sparse_ft.json_output import json_text


def inspect(
    checkpoint: CheckpointArgument,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Show how this text is routed instead.")] = None,
    route: Annotated[
        str | None,
        typer.Option(metavar="ROUTE", help="gate (the default), an expert, a YAML file with rules, or a baseline."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the experts of each token.")
    ] = None,
    min_familiarity: MinFamiliarityOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the routing of the text as JSON.")] = False,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Show the experts, sizes, tasks and scores of a checkpoint, or how it routes a text."""
    if text is not None:
        _inspect_text(
            checkpoint,
            text,
            route=route or "gate",
            picture=picture,
            as_json=json_,
            device=device or "auto",
            backbone=backbone,
            min_familiarity=min_familiarity,
        )
        return
    options = {
        "--route": route, "--picture": picture, "--min-familiarity": min_familiarity, "--json": json_ or None,
        "--device": device, "--backbone": backbone,
    }  # fmt: skip
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{option} needs a text to route, and there is none. Add --text TEXT.")
    from sparse_ft.cli.listing import describe_checkpoint

    typer.echo(describe_checkpoint(checkpoint))


def _inspect_text(
    checkpoint: Path,
    text: str,
    *,
    route: str,
    picture: Path | None,
    as_json: bool,
    device: str,
    backbone: str | None,
    min_familiarity: float | None,
) -> None:
    """Show how one text is routed; write the picture first, so that nothing is printed if that fails."""
    if picture is not None and picture.suffix.lower() != ".png":
        raise ConfigError(f"--picture {str(picture)!r} is no PNG. Give a file name that ends in .png.")
    from sparse_ft.checkpoint.folders import explain_os_errors, write_bytes
    from sparse_ft.evaluation.pictures import require_matplotlib, token_picture
    from sparse_ft.evaluation.token_routing import route_tokens
    from sparse_ft.evaluation.token_table import token_table

    if picture is not None:
        require_matplotlib()
    routing = route_tokens(
        checkpoint, text, route=route, device=device, backbone=backbone, min_familiarity=min_familiarity
    )
    if picture is not None:
        with explain_os_errors(picture):
            write_bytes(picture, token_picture(routing))
    if as_json:
        typer.echo(json_text(routing.to_dict()))
        return
    typer.echo(token_table(routing, width=shutil.get_terminal_size((120, 24)).columns))
    if picture is not None:
        typer.echo(f"\nPicture: {short_path(picture)}")
