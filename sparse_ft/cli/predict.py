"""The command predict."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_ft.cli.options import (
    BackboneOption,
    CheckpointArgument,
    CombineOption,
    DeviceOption,
)
from sparse_ft.errors import ConfigError

if TYPE_CHECKING:
    pass


def predict(
    checkpoint: CheckpointArgument,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts; without any, and without --file, standard input.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with one text a line, or - for standard input.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="A task, or all; without, the gate decides. Repeatable."),
    ] = None,
    route: Annotated[
        str, typer.Option(metavar="ROUTE", help="Who decides without --task: gate, or a YAML file with rules.")
    ] = "gate",
    combine: CombineOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Answer tasks for texts, one line a text; a tab separates the two texts of a pair, or a text and a question.

    Lines of a .jsonl file, and rows of multiple choice, are objects with text, text_pair and choices; tasks names those
    of this row, and rules look at its metadata.
    """
    from sparse_ft.cli.text_lines import format_prediction, read_rows, read_texts

    if text and file is not None:
        raise ConfigError("Texts and --file are both given. Choose one.")
    if route != "gate" and (task or combine):
        raise ConfigError(f"--route {route!r} chooses the tasks, and --task or --combine does, too. Leave one out.")
    if route != "gate" and Path(route).suffix not in {".yaml", ".yml"}:
        raise ConfigError(
            f"--route {route!r} is not for predict. Expected gate, or a YAML file with rules; evaluate and inspect "
            "compare the other routes."
        )
    texts = iter(text) if text else read_texts(file or "-")
    from sparse_ft.prediction.loaded_model import load

    rules = None if route == "gate" else route
    model = load(checkpoint, device=device or "auto", backbone=backbone, rules=rules)
    wanted: Any = None if not task else "all" if task == ["all"] else task
    asked = task if task and wanted != "all" else model.tasks
    reads = {model.tasks[name].reads for name in asked if name in model.tasks}
    as_json = "choices" in reads or (file or "").endswith(".jsonl")
    form: Any = "json" if as_json else "pair" if "pair" in reads else "text"
    for prediction in model.stream(read_rows(texts, form=form), wanted, combine=combine):
        line = json.dumps(prediction.to_dict(), ensure_ascii=False) if json_ else format_prediction(prediction)
        typer.echo(line)
    if model.rules is not None:
        for number in model.rules.unmatched():
            logging.getLogger("sparse_ft").warning("Rule %d of %s never matched.", number, route)
