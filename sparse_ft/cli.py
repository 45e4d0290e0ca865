"""The command line: parse, call one plain function, print. Heavy imports stand inside the commands."""

import json
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparse_ft.checkpoint_commands import edit, export, import_, merge
from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.options import (
    BackboneOption,
    CheckpointArgument,
    CombineOption,
    DataOption,
    DeviceOption,
    TaskNameOption,
    TaskOption,
    data_sources,
    shown_path,
)
from sparse_ft.version import __version__

if TYPE_CHECKING:
    from sparse_ft.evaluation.evaluate import Evaluation

app = typer.Typer(
    name="sparse-ft",
    help="One frozen backbone, one LoRA-sized expert per task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; a user's mistake is one paragraph on stderr and exit code 2, anything else exit code 1."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("sparse_ft").addHandler(handler)
    logging.getLogger("sparse_ft").setLevel(logging.INFO)
    try:
        app(args=arguments, prog_name="sparse-ft")
    except SparseFTError as error:
        if debug:
            raise
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # `sparse-ft predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        if _lacks_memory(error):
            typer.echo(
                f"Error: Out of memory ({str(error) or type(error).__name__}). Expected room for the backbone, the "
                "experts and a batch. Free some, use another --device, or ask for shorter texts.",
                err=True,
            )
            sys.exit(2)
        typer.echo(f"Unexpected error: {type(error).__name__}: {error}. Run again with --debug to see where.", err=True)
        sys.exit(1)


def _lacks_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from sparse_ft.backbone.devices import is_out_of_memory

    return is_out_of_memory(error)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparse-ft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """One frozen backbone, one LoRA-sized expert per task."""


@app.command()
def tasks(name: Annotated[str | None, typer.Argument(help="Bundled name, or path of a task file.")] = None) -> None:
    """List the bundled tasks, or show one with its data source, labels and example."""
    from sparse_ft.listing import describe_task, describe_tasks

    typer.echo(describe_task(name) if name else describe_tasks())


@app.command()
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


@app.command()
def evaluate(
    checkpoint: CheckpointArgument,
    task: TaskNameOption = None,
    data: DataOption = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="train, validation or test.")] = "test",
    route: Annotated[
        str, typer.Option(metavar="ROUTE", help="task, gate, an expert, a YAML file with rules, or a baseline.")
    ] = "task",
    combine: CombineOption = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores as JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.txt, report.md, report.json and pictures.")
    ] = None,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Score a checkpoint and print the classification report of each task."""
    from sparse_ft.checkpoint.folders import explain_os_errors, write_json
    from sparse_ft.evaluation.evaluate import evaluate as evaluate_checkpoint
    from sparse_ft.evaluation.reports import write_report

    result = evaluate_checkpoint(
        checkpoint,
        tasks=task,
        data=data_sources(data),
        split=split,  # type: ignore[arg-type]  # checked there
        route=route,
        combine=combine,
        device=device or "auto",
        backbone=backbone,
    )
    typer.echo(result.to_text())
    content = result.to_dict()
    if json_ is not None:
        with explain_os_errors(json_):
            write_json(json_, content)
    if report is not None:
        about = {key: content[key] for key in ("checkpoint", "split", "route")}
        pictures = _report_pictures(result)
        write_report(report, result.tasks, about=about, routing=content["routing"], pictures=pictures)


@app.command()
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
    from sparse_ft.lines import format_prediction, read_rows, read_texts

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


@app.command()
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
    from sparse_ft.listing import describe_checkpoint

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


for command in (edit, merge, export, import_):
    app.command(command.__name__.rstrip("_"))(command)


def _report_pictures(result: "Evaluation") -> dict[str, bytes]:
    """Draw the pictures of a report; without matplotlib there are none, and the rest of the report is as good."""
    from sparse_ft.evaluation.pictures import report_pictures, require_matplotlib

    try:
        require_matplotlib()
    except ConfigError as error:
        logging.getLogger("sparse_ft").warning("The report has no pictures. %s", error)
        return {}
    routing = result.routing if result.gated else None
    return report_pictures(result.tasks, routing=routing, route=result.route)


if __name__ == "__main__":
    main()
