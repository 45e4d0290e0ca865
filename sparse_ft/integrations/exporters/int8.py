"""Whole numbers of eight bits in place of the weights of an ONNX graph, and what that costs in score."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_ft.errors import DataError
from sparse_ft.evaluation.scoring import score_rows
from sparse_ft.integrations.exporters.onnx_folder import GRAPH, load_session, read_tasks, runner
from sparse_ft.integrations.exporters.parts import load_tokenizer
from sparse_ft.integrations.round_trip import foreign_logits, given_rows, rows_of
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.encoded_rows import encode_rows
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.sources import scored_split
from sparse_ft.tasks.spec import TaskSpec

INT8_GRAPH = "model.int8.onnx"


def quantise(folder: Path) -> None:
    """Write the graph of a folder once more with weights of eight bits, a scale for each output channel.

    Activations are quantised when the graph runs (dynamic quantisation), so no calibration data is needed.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(folder / GRAPH))
    # The shapes that torch noted for what lies inside do not agree with those that the quantiser infers.
    del graph.graph.value_info[:]
    quantize_dynamic(graph, str(folder / INT8_GRAPH), per_channel=True, weight_type=QuantType.QInt8)


def int8_scores(
    model: LoadedModel, tasks: Sequence[str], folder: Path, *, sources: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Score both graphs of a folder on the same rows of each task's data.

    Args:
        model: The checkpoint.
        tasks: Tasks of the graphs.
        folder: With both graphs.
        sources: Where the data of each task is.

    Returns:
        By task: the split (test, or validation where test has no answers), the rows, the metric, its value with
        ``float32`` and ``int8``, and the ``loss``, the first minus the second.

    Raises:
        DataError: If the data of a task is not found.
    """
    sessions = {"float32": load_session(folder / GRAPH), "int8": load_session(folder / INT8_GRAPH)}
    tokenizer = load_tokenizer(folder)
    described = read_tasks(folder)
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        spec, source = model.tasks[task], sources.get(task)
        split = scored_split(spec, source)
        data = encode_rows(read(spec, data=source, splits=[split])[split].to_dict(), spec=spec, encoder=model.encoder)
        by_text = "parents" in data.columns  # words as split here, not as the annotation cuts them
        rows = rows_of(spec, data.columns["text"]) if by_text else given_rows(data.columns)
        values: dict[str, float] = {}
        scored = 0
        for name, session in sessions.items():
            run = runner(session, task, described)
            logits = foreign_logits(rows, spec=spec, encoder=model.encoder, run=run, tokenizer=tokenizer)
            if not logits:
                raise DataError(
                    f"The {split} split of task {task!r} has no row that fits {model.encoder.max_length} tokens."
                )
            values[name], scored = _score(spec, data, logits), len(logits)
        loss = values["float32"] - values["int8"]
        found[task] = {"split": split, "rows": scored, "metric": spec.metric, **values, "loss": loss}
    return found


def _score(spec: TaskSpec, data: Any, logits: dict[int, Tensor]) -> float:
    places = list(logits)
    columns = {name: [values[place] for place in places] for name, values in data.columns.items()}
    guessed = find_kind(spec.kind).predictions(list(logits.values()), columns=columns, labels=spec.label_names or [])
    by_row: list[Any] = [None] * data.num_rows
    for place, answer in zip(places, guessed, strict=True):
        by_row[place] = answer
    return float(score_rows(spec, data, by_row, rows=places).metrics[spec.metric])
