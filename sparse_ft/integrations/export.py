"""Export a checkpoint to a foreign format, run the written files, and compare their answers with the checkpoint's."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ft.checkpoint.checkpoint import describe_origin
from sparse_ft.checkpoint.folders import replace_folder, write_bytes, write_json
from sparse_ft.checkpoint.outputs import claimed_output
from sparse_ft.errors import ConfigError
from sparse_ft.integrations.exporters import Exporter, find_exporter
from sparse_ft.integrations.exporters.int8 import int8_scores, quantise
from sparse_ft.integrations.model_card import model_card
from sparse_ft.integrations.round_trip import TOLERANCE, Difference
from sparse_ft.prediction.loaded_model import LoadedModel, load
from sparse_ft.tasks.sources import name_sources

_LOG = logging.getLogger("sparse_ft")

RECORD = "export.json"
"""File in which an export describes itself; ``import`` reads it."""


@dataclass(frozen=True)
class Export:
    """The outcome of ``export``."""

    path: Path
    """The folder; for PEFT and transformers it holds one folder for each task if there are several."""
    differences: dict[str, Difference]
    """Task to the distance of the export's answers from the checkpoint's on sample texts."""
    int8: dict[str, dict[str, Any]]
    """Task to its scores with float32 and with int8; see ``int8_scores``. Empty without ``int8``."""


def export(
    checkpoint: str | Path | LoadedModel,
    *,
    format: str,
    output: str | Path,
    task: str | None = None,
    int8: bool = False,
    data: str | Path | Mapping[str, str] | None = None,
    backbone: str | None = None,
    trust_tasks: bool = False,
) -> Export:
    """Write tasks of a checkpoint in a format that other libraries read, with tokenizer, model card and export.json.

    Each export is loaded as its user would load it and run on sample texts before it appears at ``output``.

    Args:
        checkpoint: A folder, or a loaded model, which no other thread may use meanwhile.
        format: ``peft``: the expert as an adapter, head included. ``transformers``: a dense model with the expert
            folded in. ``multitask``: one dense model with a head for each task, where one expert serves all
            (``distill`` with one pass). ``onnx``: one graph with the experts and heads of all tasks.
        output: Folder to write; must be empty or not exist.
        task: The task to export; None exports all.
        int8: With ``onnx``, write a second graph with int8 weights, and the score that it loses.
        data: For ``int8``: folder or file for the one task, or task name to such; None takes the data of training.
        backbone: Where the backbone is now, if not where the checkpoint says.
        trust_tasks: For ``int8``: whether tasks of the checkpoint may name code (``metric: evaluate:…``) and data on
            the hub.

    Raises:
        ConfigError: If a name is unknown, the output exists, or a package is missing.
        ExportError: If the format cannot express a task, or the answers differ. Nothing is written.
        DataError: If data that ``int8`` needs is missing.
    """
    exporter = find_exporter(format)
    _check_options(format, int8=int8, data=data)
    with claimed_output(output) as folder:
        model = checkpoint if isinstance(checkpoint, LoadedModel) else load(checkpoint, device="cpu", backbone=backbone)
        names = _exported_tasks(model, exporter, task)
        sources = {**model.checkpoint.config.sources, **name_sources(data, names)}
        return _write(
            model, names, folder, exporter, format=format, int8=int8, sources=sources, trust_tasks=trust_tasks
        )


def _write(
    model: LoadedModel,
    names: Sequence[str],
    folder: Path,
    exporter: Exporter,
    *,
    format: str,
    int8: bool,
    sources: Mapping[str, Any],
    trust_tasks: bool,
) -> Export:
    """Write tasks into a folder, with their differences from the checkpoint."""
    apart = not exporter.together and len(names) > 1
    folders = {name: [name] for name in names} if apart else {"": list(names)}
    differences: dict[str, Difference] = {}
    scores: dict[str, dict[str, Any]] = {}

    def fill(staged: Path) -> None:
        for name, tasks in folders.items():
            _LOG.info("Writing %s as %s, and comparing its answers with the checkpoint's", ", ".join(tasks), format)
            (staged / name).mkdir(exist_ok=True)
            differences.update(exporter.write(model, tasks, staged / name))
            for exported in tasks:
                differences[exported].check(exported)
            if int8:
                quantise(staged / name)
                scores.update(int8_scores(model, tasks, staged / name, sources=sources, trust_tasks=trust_tasks))
            card = model_card(model, tasks, format=format, folder=(folder / name).name)
            write_bytes(staged / name / "README.md", card.encode())
            record = _record(model, tasks, format=format, differences=differences, int8=scores)
            write_json(staged / name / RECORD, record)

    replace_folder(folder, fill)
    return Export(folder, differences, scores)


def _check_options(format: str, *, int8: bool, data: str | Path | Mapping[str, str] | None) -> None:
    """Refuse options that the format does not have."""
    if not isinstance(int8, bool):
        raise ConfigError(f"int8 is {int8!r}. Expected True or False.")
    if data is not None and not int8 and format == "onnx":
        raise ConfigError("--data is for --int8, which scores the int8 graph. Add --int8, or leave --data out.")
    if (int8 or data is not None) and format != "onnx":
        raise ConfigError(f"--int8, and --data for it, are of the format onnx, not {format}. Leave them out.")


def _exported_tasks(model: LoadedModel, exporter: Exporter, task: str | None) -> list[str]:
    """Return the tasks to export, if they exist and the format can express all of them."""
    if not model.tasks:
        raise ConfigError(f"{str(model.checkpoint.path)!r} has no task, so there are no answers to export.")
    names = list(model.tasks) if task is None else [task]
    for name in names:
        model.checkpoint.model.head(name)
        exporter.expert_of(model, name)
    return names


def _record(
    model: LoadedModel,
    tasks: Sequence[str],
    *,
    format: str,
    differences: Mapping[str, Difference],
    int8: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return the content of export.json: enough to trust the export, and to import it again."""
    inner = model.checkpoint.model
    return {
        "format": format,
        **describe_origin(inner),
        "pooling": inner.pooling,
        "max_length": model.encoder.max_length,
        "tolerance": TOLERANCE,
        "tasks": {
            name: {
                "expert": inner.tasks[name].experts[0],
                "difference": differences[name].to_dict(),
                **({"int8": int8[name]} if name in int8 else {}),
                "spec": model.tasks[name].model_dump(exclude_defaults=True),
            }
            for name in tasks
        },
    }
