"""Quantise the weights of an ONNX graph to int8, and score both graphs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_ft.errors import DataError
from sparse_ft.evaluation.scoring import score_rows
from sparse_ft.integrations.exporters.onnx_folder import GRAPH, load_session, read_tasks, runner
from sparse_ft.integrations.exporters.parts import load_tokenizer
from sparse_ft.integrations.round_trip import foreign_logits, rows_of_columns, rows_of_texts
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.encoded_rows import EncodedRows, encode_rows
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import is_undivided
from sparse_ft.tasks.sources import read_scored, scored_split
from sparse_ft.tasks.spec import TaskSpec

INT8_GRAPH = "model.int8.onnx"


def quantise(folder: Path) -> None:
    """Write the graph of a folder once more with weights of eight bits, a scale for each output channel.

    Activations are quantised when the graph runs (dynamic quantisation), so no calibration data is needed.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(folder / GRAPH))
    # The shapes that torch noted for inner values contradict those that the quantiser infers.
    del graph.graph.value_info[:]
    quantize_dynamic(graph, str(folder / INT8_GRAPH), per_channel=True, weight_type=QuantType.QInt8)


def int8_scores(
    model: LoadedModel, tasks: Sequence[str], folder: Path, *, sources: Mapping[str, str], trust_tasks: bool = False
) -> dict[str, dict[str, Any]]:
    """Score both graphs of a folder on the same rows of each task's data.

    Args:
        model: The checkpoint.
        tasks: Tasks of the graphs.
        folder: Folder with both graphs.
        sources: Task to the path of its data.
        trust_tasks: Whether the tasks may name code and data on the hub.

    Returns:
        By task: the split (test, or validation where test has no answers) or the file, the rows, the metric, its value
        with ``float32`` and ``int8``, and the ``loss``, the first minus the second.

    Raises:
        DataError: If the data of a task is not found.
    """
    sessions = {"float32": load_session(folder / GRAPH), "int8": load_session(folder / INT8_GRAPH)}
    tokenizer = load_tokenizer(folder)
    described = read_tasks(folder)
    scores: dict[str, dict[str, Any]] = {}
    for task in tasks:
        spec, source = model.tasks[task], sources.get(task)
        spec = spec.marked(foreign=spec.foreign and not trust_tasks)
        split = "test" if is_undivided(source) else scored_split(spec, source)
        scored_rows = read_scored(spec, split, source, trained_on=model.checkpoint.config.sources.get(task))
        data = encode_rows(scored_rows.rows.to_dict(), spec=spec, encoder=model.encoder)
        by_text = "parents" in data.columns  # words as split here, not as the annotation cuts them
        rows = rows_of_texts(spec, data.columns["text"]) if by_text else rows_of_columns(data.columns)
        values: dict[str, float] = {}
        scored = 0
        for name, session in sessions.items():
            run = runner(session, task, described)
            logits = foreign_logits(rows, spec=spec, encoder=model.encoder, run=run, tokenizer=tokenizer)
            if not logits:
                raise DataError(
                    f"{scored_rows.name} of task {task!r} has no row that fits {model.encoder.max_length} tokens."
                )
            values[name], scored = _score(spec, data, logits), len(logits)
        loss = values["float32"] - values["int8"]
        scores[task] = {"split": scored_rows.name, "rows": scored, "metric": spec.metric, **values, "loss": loss}
    return scores


def _score(spec: TaskSpec, data: EncodedRows, logits: dict[int, Tensor]) -> float:
    """Score the rows that have logits by the metric of the task."""
    rows, labels = list(logits), spec.label_names or []
    columns = {name: [values[row] for row in rows] for name, values in data.columns.items()}
    predictions = find_kind(spec.kind).predictions(list(logits.values()), columns=columns, labels=labels)
    by_row: list[Any] = [None] * data.num_rows
    for row, prediction in zip(rows, predictions, strict=True):
        by_row[row] = prediction
    return float(score_rows(spec, data, by_row, rows=rows).metrics[spec.metric])
