"""The command evaluate."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_ft.cli.options import (
    BackboneOption,
    CheckpointArgument,
    CombineOption,
    DataOption,
    DeviceOption,
    MinFamiliarityOption,
    TaskNameOption,
    TrustOption,
    parse_sources,
)
from sparse_ft.errors import ConfigError
from sparse_ft.paths import user_path

if TYPE_CHECKING:
    from sparse_ft.evaluation.evaluate import Evaluation


def evaluate(
    checkpoint: CheckpointArgument,
    task: TaskNameOption = None,
    data: DataOption = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="train, validation or test.")] = "test",
    route: Annotated[
        str, typer.Option(metavar="ROUTE", help="task, gate, an expert, a YAML file with rules, or a baseline.")
    ] = "task",
    combine: CombineOption = None,
    min_familiarity: MinFamiliarityOption = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores as JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.txt, report.md, report.json and pictures.")
    ] = None,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
    trust_tasks: TrustOption = False,
) -> None:
    """Score a checkpoint and print the classification report of each task."""
    from sparse_ft.checkpoint.folders import explain_os_errors, write_json
    from sparse_ft.checkpoint.manifest import find_manifest

    find_manifest(user_path(checkpoint))  # before torch is loaded
    from sparse_ft.evaluation.evaluate import evaluate as evaluate_checkpoint
    from sparse_ft.evaluation.score_report import write_report

    result = evaluate_checkpoint(
        checkpoint,
        tasks=task or None,
        data=parse_sources(data),
        split=split,  # type: ignore[arg-type]  # checked there
        route=route,
        combine=combine,
        device=device or "auto",
        backbone=backbone,
        min_familiarity=min_familiarity,
        trust_tasks=trust_tasks,
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


def _report_pictures(result: "Evaluation") -> dict[str, bytes]:
    """Draw the pictures of a report; return none, with a warning, if matplotlib is missing."""
    from sparse_ft.evaluation.pictures import report_pictures, require_matplotlib

    try:
        require_matplotlib()
    except ConfigError as error:
        logging.getLogger("sparse_ft").warning("The report has no pictures. %s", error)
        return {}
    routing = result.routing if result.gated else None
    return report_pictures(result.tasks, routing=routing, route=result.route)
