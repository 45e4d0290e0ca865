"""The command predict."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_ft.cli.options import (
    BackboneOption,
    CheckpointArgument,
    CombineOption,
    DeviceOption,
    MinFamiliarityOption,
    short_path,
)
from sparse_ft.cli.streams import check_stdin
from sparse_ft.errors import ConfigError
from sparse_ft.paths import user_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparse_ft.cli.text_files import LineForm
    from sparse_ft.prediction.loaded_model import LoadedModel
    from sparse_ft.tasks.kinds.answers import Prediction


def predict(
    checkpoint: CheckpointArgument,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts; without any, and without --file, standard input is read.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="One text a line; .jsonl, .csv or .tsv with a column text; a folder of .txt files; - for standard "
            "input.",
        ),
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
    explain: Annotated[
        bool, typer.Option("--explain", help="Show which blocks the tasks share, and answer nothing.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the answers to a .jsonl or .csv file instead.")
    ] = None,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Answer tasks for texts, one line a text; a tab separates the two texts of a pair, or a text and a question.

    Rows of .jsonl, .csv and .tsv files have the fields text and text_pair, may name their own tasks, and in .jsonl hold
    choices, and metadata for rules. Other fields, such as an id, are repeated in the answer.
    """
    from sparse_ft.checkpoint.manifest import find_manifest
    from sparse_ft.cli.text_files import read_file, read_lines

    _check_together(text, file=file, output=output, json_=json_)
    _check_route(route, min_familiarity, names_tasks=bool(task or combine))
    target = None if explain else _check_files(text, file=file, output=output)
    find_manifest(user_path(checkpoint))
    from sparse_ft.prediction.loaded_model import load

    rules = None if route == "gate" else route
    model = load(checkpoint, device=device or "auto", backbone=backbone, rules=rules, min_familiarity=min_familiarity)
    if explain:
        return typer.echo(model.explain("all" if task in (None, [], ["all"]) else task or "all"))
    form = _line_form(model, task or [])
    rows = read_lines(text, form=form) if text else read_file(file or "-", form=form)
    predictions = model.stream(rows, "all" if task == ["all"] else task or None, combine=combine)
    if target is not None:
        tasks = list(model.tasks) if task in (None, [], ["all"]) else task
        _write_answers(predictions, target, tasks=tasks or [])
    else:
        _print_answers(predictions, as_json=json_)
    for number in [] if model.rules is None else model.rules.unmatched():
        logging.getLogger("sparse_ft").warning("Rule %d of %s never matched.", number, route)


def _check_together(text: list[str] | None, *, file: str | None, output: Path | None, json_: bool) -> None:
    if text and file is not None:
        raise ConfigError("Texts and --file are both given. Choose one.")
    if output is not None and json_:
        raise ConfigError("--output writes the answers to a file, and --json prints them. Choose one.")


def _check_files(text: list[str] | None, *, file: str | None, output: Path | None) -> Path | None:
    """Check, before the model is loaded, that the texts can be read; return the path that the answers go to."""
    from sparse_ft.cli.answer_files import check_answer_file
    from sparse_ft.cli.text_files import find_file

    if file not in (None, "-"):
        find_file(file)
    target = None if output is None else check_answer_file(output, source=file)
    if not text and file in (None, "-"):
        check_stdin()
    return target


def _print_answers(predictions: "Iterator[Prediction]", *, as_json: bool) -> None:
    from sparse_ft.cli.answer_lines import format_prediction
    from sparse_ft.json_output import json_text

    for prediction in predictions:
        typer.echo(json_text(prediction.to_dict()) if as_json else format_prediction(prediction))


def _write_answers(predictions: "Iterator[Prediction]", target: Path, *, tasks: list[str]) -> None:
    from sparse_ft.cli.answer_files import answer_file
    from sparse_ft.progress import progress_bar

    number = 0
    with answer_file(target, tasks=tasks) as write, progress_bar("answering", unit="text") as bar:
        for prediction in predictions:
            write(prediction)
            number += 1
            bar.update()
    typer.echo(f"Answers to {number} {'text' if number == 1 else 'texts'}: {short_path(target)}")


def _check_route(route: str, min_familiarity: float | None, *, names_tasks: bool) -> None:
    if min_familiarity is not None and names_tasks:
        raise ConfigError(
            "--min-familiarity turns away texts whose tasks the gate chooses, and --task or --combine names the tasks. "
            "Leave one out."
        )
    if route == "gate":
        return
    if names_tasks:
        raise ConfigError(f"--route {route!r} chooses the tasks, and --task or --combine does, too. Leave one out.")
    if Path(route).suffix not in {".yaml", ".yml"}:
        raise ConfigError(
            f"--route {route!r} is not for predict. Expected gate, or a YAML file with rules; evaluate and inspect "
            "compare the other routes."
        )


def _line_form(model: "LoadedModel", tasks: list[str]) -> "LineForm":
    """Return the form of an input line that the tasks read."""
    names = model.tasks if tasks in ([], ["all"]) else tasks
    reads = {model.tasks[name].reads for name in names if name in model.tasks}
    if "choices" in reads:
        return "json"
    return "pair" if "pair" in reads else "text"
