"""The command predict."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparse_ft.cli.options import (
    BackboneOption,
    CheckpointArgument,
    CombineOption,
    DeviceOption,
    MinFamiliarityOption,
)
from sparse_ft.cli.streams import check_stdin
from sparse_ft.errors import ConfigError

if TYPE_CHECKING:
    from sparse_ft.prediction.loaded_model import LoadedModel


def predict(
    checkpoint: CheckpointArgument,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts; without any, and without --file, standard input is read.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with one text a line, or - for standard input.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="Task to answer, or all; default: the gate decides. Repeatable."),
    ] = None,
    route: Annotated[
        str, typer.Option(metavar="ROUTE", help="Without --task: gate, or a YAML file with rules, chooses the experts.")
    ] = "gate",
    combine: CombineOption = None,
    min_familiarity: MinFamiliarityOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Answer tasks for texts, one line a text; a tab separates the two texts of a pair, or a text and a question.

    Lines of a .jsonl file, and rows of multiple choice, are JSON objects with text, text_pair and choices. An object
    may also name its own tasks, and hold metadata for rules.
    """
    from sparse_ft.cli.text_lines import format_prediction, read_rows, read_texts
    from sparse_ft.json_output import json_text

    if text and file is not None:
        raise ConfigError("Texts and --file are both given. Choose one.")
    _check_route(route, names_tasks=bool(task or combine))
    if min_familiarity is not None and (task or combine):
        raise ConfigError(
            "--min-familiarity turns away texts whose tasks the gate chooses, and --task or --combine names the tasks. "
            "Leave one out."
        )
    if not text and file in (None, "-"):
        check_stdin()
    texts = iter(text) if text else read_texts(file or "-")
    from sparse_ft.prediction.loaded_model import load

    rules = None if route == "gate" else route
    model = load(checkpoint, device=device or "auto", backbone=backbone, rules=rules, min_familiarity=min_familiarity)
    rows = read_rows(texts, form=_line_form(model, task or [], file))
    for prediction in model.stream(rows, "all" if task == ["all"] else task or None, combine=combine):
        line = json_text(prediction.to_dict()) if json_ else format_prediction(prediction)
        typer.echo(line)
    if model.rules is not None:
        for number in model.rules.unmatched():
            logging.getLogger("sparse_ft").warning("Rule %d of %s never matched.", number, route)


def _check_route(route: str, *, names_tasks: bool) -> None:
    if route == "gate":
        return
    if names_tasks:
        raise ConfigError(f"--route {route!r} chooses the tasks, and --task or --combine does, too. Leave one out.")
    if Path(route).suffix not in {".yaml", ".yml"}:
        raise ConfigError(
            f"--route {route!r} is not for predict. Expected gate, or a YAML file with rules; evaluate and inspect "
            "compare the other routes."
        )


def _line_form(model: "LoadedModel", tasks: list[str], file: str | None) -> Literal["text", "pair", "json"]:
    """Return how a line of input is read, by what the tasks read and by the name of the file."""
    names = model.tasks if tasks in ([], ["all"]) else tasks
    reads = {model.tasks[name].reads for name in names if name in model.tasks}
    if "choices" in reads or (file or "").endswith(".jsonl"):
        return "json"
    return "pair" if "pair" in reads else "text"
