"""The README.md of an export: what the task is, how well the checkpoint does it, and how to run the files."""

from collections.abc import Sequence
from typing import Any

import jinja2

from sparse_ft.backbone.words import split_words
from sparse_ft.integrations.exporters.modelling import read_template
from sparse_ft.integrations.exporters.parts import any_shapes, empty_classifier, sole_expert
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import TaskSpec


def model_card(model: LoadedModel, tasks: Sequence[str], *, format: str, folder: str) -> str:
    """Write the card of an export.

    Args:
        model: The checkpoint.
        tasks: Tasks that the export answers; the first is the example.
        format: A key of EXPORTERS.
        folder: Name of the export's folder.
    """
    inner, spec = model.checkpoint.model, model.tasks[tasks[0]]
    levels = {find_kind(model.tasks[task].kind).level for task in tasks}
    tags = find_kind(spec.kind).level == "word"
    metrics = model.checkpoint.metrics
    return _template().render(
        format=format,
        folder=folder,
        backbone=inner.backbone.name,
        task=tasks[0],
        tasks={task: model.tasks[task] for task in tasks},
        tags=tags,
        levels=levels,
        multi_label=spec.kind == "multi_label",
        text=repr(spec.example or "Your text here."),
        example=_example(spec, format=format, tags=tags),
        num_outputs=len(find_kind(spec.kind).outputs(spec.label_names or [])),
        pooling=inner.pooling,
        head=empty_classifier(inner.backbone.config).head if format == "peft" else None,
        shapes=any_shapes(model, tasks),
        several_experts=format == "onnx" and len({sole_expert(model, task).name for task in tasks}) > 1,
        piece="last" if model.encoder.last_piece else "first",
        max_length=model.encoder.max_length,
        gate=inner.gate is not None,
        scores={task: metrics[task] for task in tasks if metrics.get(task, {}).get("metrics")},
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(read_template("README.md"))


def _example(spec: TaskSpec, *, format: str, tags: bool) -> str:
    """Return an input of the task as an expression of Python."""
    text, _, second = (spec.example or "Your text here.").partition("\t")
    example: Any = (text, second) if spec.reads == "pair" else text
    if tags and format != "peft":
        example = [word.text for word in split_words(text, spec.language)]
    if spec.reads == "pair" and format == "peft":
        return f"{text!r}, {second!r}"
    if spec.reads == "pair" and format == "transformers":
        example = {"text": text, "text_pair": second}
    return repr(example)
