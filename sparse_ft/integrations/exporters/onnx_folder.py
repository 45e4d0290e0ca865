"""Export to ONNX: one graph for one task, or for the experts and heads of all tasks.

With several experts the graph has the input ``expert`` [rows], and each row fetches the matrices of its expert; a
single expert is folded into the weights. All heads read all rows; the caller takes the output of each row's task.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_ft.backbone.words import SHAPES
from sparse_ft.checkpoint.folders import write_json
from sparse_ft.documents import read_json_object
from sparse_ft.errors import ConfigError, ExportError
from sparse_ft.integrations.exporters.graph import Graph
from sparse_ft.integrations.exporters.modelling import write_words
from sparse_ft.integrations.exporters.parts import load_tokenizer, save_tokenizer, sole_expert
from sparse_ft.integrations.round_trip import Difference, Run, compare
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.kinds import find_kind

GRAPH = "model.onnx"
TASKS = "tasks.json"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def _require_onnx() -> None:
    """Raise a ConfigError if a package of the extra ``onnx`` is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"An export to onnx needs {', '.join(missing)}, which is not installed. Install it with "
            '`pip install "sparse-ft[onnx]"`.'
        )


def write_onnx(model: LoadedModel, tasks: Sequence[str], folder: Path) -> dict[str, Difference]:
    """Write the graph of some tasks into a folder, and run it through onnxruntime; see ``Exporter.write``."""
    _require_onnx()
    inner = model.checkpoint.model
    experts = {expert.name: expert for expert in (sole_expert(model, task) for task in tasks)}
    if len(experts) > 1 and not inner.backbone.family.routes_rows:
        raise ExportError(
            f"The layers of {inner.backbone.config.model_type!r} do not see one row a text, so one graph cannot hold "
            f"its {len(experts)} experts. Export one task at a time with --task."
        )
    graph = Graph(model, tasks, list(experts.values()))
    _trace(graph, folder / GRAPH)
    save_tokenizer(model, folder)
    described = _describe(model, tasks, graph)
    write_json(folder / TASKS, described)
    if graph.tables is not None:
        write_words(folder)
    session, tokenizer = load_session(folder / GRAPH), load_tokenizer(folder)
    return {
        task: compare(model, task, run=runner(session, task, described["tasks"]), tokenizer=tokenizer) for task in tasks
    }


def load_session(file: Path) -> Any:
    """Open a graph with onnxruntime, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def read_tasks(folder: Path) -> dict[str, Any]:
    """Read the entries of tasks.json, by task."""
    return dict(read_json_object(folder / TASKS, error=ExportError)["tasks"])


def runner(session: Any, task: str, described: dict[str, Any]) -> Run:
    """Return a function that runs batches of a task through a graph.

    Args:
        session: From ``load_session``.
        task: The task.
        described: The entries of tasks.json, by task.
    """
    names = {entry.name for entry in session.get_inputs()}

    def run(batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        shapes = torch.zeros_like(ids)
        experts = torch.full((len(ids),), described[task]["expert"])
        inputs = {"word_shapes": shapes, "token_type_ids": torch.zeros_like(ids), "expert": experts, **batch}
        feed = {name: value.numpy() for name, value in inputs.items() if name in names}
        (logits,) = session.run([task], feed)
        return torch.from_numpy(logits)

    return run


def _describe(model: LoadedModel, tasks: Sequence[str], graph: Graph) -> dict[str, Any]:
    """Describe the inputs and outputs of the graph for its user."""
    inputs = {
        "input_ids": "[rows, tokens] int64, of the tokenizer in this folder",
        "attention_mask": "[rows, tokens] int64, 1 for real tokens, padding on the right",
    }
    if graph.has_types:
        inputs["token_type_ids"] = "[rows, tokens] int64, of the tokenizer; 0 for single texts"
    if graph.tables is not None:
        inputs["word_shapes"] = (
            "[rows, tokens] int64, index in shapes of how the word of each token is written (words.py beside says it); "
            "0 outside words and in tasks on texts"
        )
    if len(graph.experts) > 1:
        inputs["expert"] = "[rows] int64, the expert of the task that each row is for"
    entries = {}
    for task in tasks:
        spec = model.tasks[task]
        kind, slot = find_kind(spec.kind), model.checkpoint.model.tasks[task]
        entries[task] = {
            "expert": [expert.name for expert in graph.experts].index(slot.experts[0]),
            "kind": spec.kind,
            "output": "[rows, tokens, labels]" if kind.level == "word" else "[rows, labels]",
            "labels": kind.outputs(spec.label_names or []),
            **({"tag_of_word_at": "last" if model.encoder.last_piece else "first"} if kind.level == "word" else {}),
        }
    return {
        "inputs": inputs,
        **({"shapes": list(SHAPES)} if graph.tables is not None else {}),
        "max_length": model.encoder.max_length,
        "tasks": entries,
    }


def _trace(graph: Graph, file: Path) -> None:
    """Write a graph that takes any number of rows and tokens."""
    rows, tokens = torch.export.Dim("rows", min=1), torch.export.Dim("tokens", min=1)
    inputs = {name: value for name, value in graph.example().items() if value is not None}
    taken = next((task for task in graph.outputs if task in inputs), None)
    if taken is not None:
        raise ExportError(
            f"Task {taken!r} has the name of an input of the graph ({', '.join(inputs)}). Copy it under another name, "
            "sparse-ft edit --copy EXPERT=NEW, and export the copy with --task NEW."
        )
    shapes = {name: {0: rows, 1: tokens} if value.dim() == 2 else {0: rows} for name, value in inputs.items()}
    with _quiet():
        program = torch.onnx.export(
            graph.eval(), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, output_names=graph.outputs, verbose=False
        )
    assert program is not None
    outputs = {id(value) for value in program.model.graph.outputs}
    for node in program.model.graph:
        for value in node.outputs:
            if value.name in graph.outputs and id(value) not in outputs:
                value.name = f"{value.name}.inner"  # no name of a task has a dot
    program.save(str(file))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of torch's exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
