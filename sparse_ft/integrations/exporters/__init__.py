"""The foreign formats, by their names in ``--format``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.named_experts import Expert
from sparse_ft.integrations.exporters.multitask_folder import write_multitask_folder
from sparse_ft.integrations.exporters.onnx_folder import write_onnx
from sparse_ft.integrations.exporters.parts import sole_expert, task_expert
from sparse_ft.integrations.exporters.peft_folder import plain_expert, write_peft
from sparse_ft.integrations.exporters.transformers_folder import write_transformers
from sparse_ft.integrations.round_trip import Difference
from sparse_ft.prediction.loaded_model import LoadedModel


class Exporter(NamedTuple):
    """A foreign format."""

    write: Callable[[LoadedModel, Sequence[str], Path], dict[str, Difference]]
    """Writes tasks into a folder, runs the files, and returns by task how far their answers are from the checkpoint's.

    Raises an ExportError if the format cannot express a task, and a ConfigError if a package is missing."""
    together: bool
    """Whether one folder holds all tasks; otherwise each task has a folder."""
    expert_of: Callable[[LoadedModel, str], Expert] = sole_expert
    """Returns the expert of a task, or raises an ExportError if the format cannot express the task."""


EXPORTERS: dict[str, Exporter] = {
    "peft": Exporter(write_peft, together=False, expert_of=plain_expert),
    "transformers": Exporter(write_transformers, together=False),
    "multitask": Exporter(write_multitask_folder, together=True, expert_of=task_expert),
    "onnx": Exporter(write_onnx, together=True),
}


def find_exporter(name: str) -> Exporter:
    """Return the exporter of this name, or raise a ConfigError."""
    if name not in EXPORTERS:
        raise ConfigError(unknown_name("format", name, EXPORTERS))
    return EXPORTERS[name]
