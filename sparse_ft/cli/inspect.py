"""The command inspect."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_ft.cli.options import (
    BackboneOption,
    CheckpointArgument,
    DeviceOption,
    shown_path,
)
from sparse_ft.errors import ConfigError

if TYPE_CHECKING:
    pass


def inspect(
    checkpoint: CheckpointArgument,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Show instead which experts each token of a text goes to.")
    ] = None,
    route: Annotated[
        str | None,
        typer.Option(metavar="ROUTE", help="gate (the default), an expert, a YAML file with rules, or a baseline."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the experts of the tokens, too.")
    ] = None,
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
        )
        return
    options = {"--route": route, "--picture": picture, "--json": json_, "--device": device, "--backbone": backbone}
    for option, value in options.items():
        if value:
            raise ConfigError(f"{option} is about the routing of a text, and none is given. Add --text TEXT.")
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
) -> None:
    """Show how one text is routed; nothing is printed if the picture cannot be written."""
    if picture is not None and picture.suffix.lower() != ".png":
        raise ConfigError(f"--picture {str(picture)!r} is no PNG. Give a file name that ends in .png.")
    from sparse_ft.checkpoint.folders import explain_os_errors, write_bytes
    from sparse_ft.evaluation.pictures import require_matplotlib, token_picture
    from sparse_ft.evaluation.token_routing import route_tokens
    from sparse_ft.evaluation.token_table import token_table

    if picture is not None:
        require_matplotlib()
    routed = route_tokens(checkpoint, text, route=route, device=device, backbone=backbone)
    if picture is not None:
        with explain_os_errors(picture):
            write_bytes(picture, token_picture(routed))
    if as_json:
        typer.echo(json.dumps(routed.to_dict(), ensure_ascii=False))
        return
    typer.echo(token_table(routed, width=shutil.get_terminal_size((120, 24)).columns))
    if picture is not None:
        typer.echo(f"\nPicture: {shown_path(picture)}")
