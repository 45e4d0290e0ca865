"""Export a checkpoint to a foreign format; what was written is run, and compared with the checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ft.checkpoint.checkpoint import describe_origin
from sparse_ft.checkpoint.folders import replace_folder, write_bytes, write_json
from sparse_ft.checkpoint.outputs import free_output
from sparse_ft.errors import ConfigError
from sparse_ft.integrations.exporters import find_exporter
from sparse_ft.integrations.exporters.int8 import int8_scores, quantise
from sparse_ft.integrations.model_card import model_card
from sparse_ft.integrations.round_trip import TOLERANCE, Difference
from sparse_ft.prediction.loaded_model import LoadedModel, load
from sparse_ft.tasks.sources import name_sources

RECORD = "export.json"
"""What an export says of itself; also what ``import`` reads."""


@dataclass(frozen=True)
class Export:
    """What ``export`` wrote."""

    path: Path
    """The folder; PEFT and transformers have one folder a task in it if several tasks were exported."""
    differences: dict[str, Difference]
    """By task: how far the export's answers were from the checkpoint's when it was tried."""
    int8: dict[str, dict[str, Any]]
    """By task, the score with float32 and with int8; see ``int8_scores``. Empty without ``int8``."""


def export(
    checkpoint: str | Path | LoadedModel,
    *,
    format: str,
    output: str | Path,
    task: str | None = None,
    int8: bool = False,
    data: str | Path | Mapping[str, str] | None = None,
    backbone: str | None = None,
) -> Export:
    """Write tasks of a checkpoint in a format that other libraries read, with tokenizer, model card and export.json.

    Each export is loaded as its user would and run on sample texts before it is put in its place.

    Args:
        checkpoint: A folder, or what ``load`` gave, which no other thread may use meanwhile.
        format: ``peft``: the expert as an adapter, head included. ``transformers``: a dense model with the expert
            folded in. ``onnx``: one graph with the experts and heads of all tasks.
        output: Folder to write; must be empty or not exist.
        task: Only this one; None takes all.
        int8: With ``onnx``, write a second graph with weights of eight bits, and the score that it loses.
        data: For ``int8``: folder or file for the one task, or task name to such; None takes what each was trained on.
        backbone: Where the backbone is now, if not where the checkpoint says.

    Raises:
        ConfigError: If a name is unknown, the output exists, or a package is missing.
        ExportError: If the format cannot express a task, or the answers differ; nothing is written then.
        DataError: If ``int8`` needs data that is not found.
    """
    exporter = find_exporter(format)
    if data is not None and not int8 and format == "onnx":
        raise ConfigError(
            "--data is for --int8, which scores the graph of eight bits. Add --int8, or leave --data out."
        )
    if (int8 or data is not None) and format != "onnx":
        raise ConfigError(f"--int8, and --data for it, are of the format onnx, not {format}. Leave them out.")
    folder = free_output(output)
    model = checkpoint if isinstance(checkpoint, LoadedModel) else load(checkpoint, device="cpu", backbone=backbone)
    if not model.tasks:
        raise ConfigError(f"{str(model.checkpoint.path)!r} has no task, so there are no answers to export.")
    names = list(model.tasks) if task is None else [task]
    for name in names:
        model.checkpoint.model.head(name)
        exporter.expert_of(model, name)
    sources = {**model.checkpoint.config.sources, **name_sources(data, names)}
    apart = not exporter.together and len(names) > 1
    groups = {name: [name] for name in names} if apart else {"": names}
    differences: dict[str, Difference] = {}
    scores: dict[str, dict[str, Any]] = {}

    def fill(staged: Path) -> None:
        for place, tasks in groups.items():
            own = staged / place
            own.mkdir(exist_ok=True)
            differences.update(exporter.write(model, tasks, own))
            for name in tasks:
                differences[name].check(name)
            if int8:
                quantise(own)
                scores.update(int8_scores(model, tasks, own, sources=sources))
            card = model_card(model, tasks, format=format, folder=(folder / place).name)
            write_bytes(own / "README.md", card.encode())
            write_json(own / RECORD, _record(model, tasks, format=format, differences=differences, int8=scores))

    replace_folder(folder, fill)
    return Export(folder, differences, scores)


def _record(
    model: LoadedModel,
    tasks: Sequence[str],
    *,
    format: str,
    differences: Mapping[str, Difference],
    int8: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return what export.json holds: enough to trust the export, and for ``import`` to read it back."""
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
