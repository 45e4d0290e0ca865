"""Whether what was exported gives the answers of its checkpoint: the same texts through both, logit by logit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_ft.backbone.encoding import PROBE_TEXTS, Encoder
from sparse_ft.backbone.words import SHAPES, split_words, word_shape
from sparse_ft.errors import ExportError, SparseFTError
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.prediction.requests import Text
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.spec import TaskSpec, load_task

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit or of 1; float32 in another order gives 1e-6."""
ROWS = 32
"""Rows of the task's data that are tried, beside the odd texts."""
_BATCH = 16

_BUNDLED = ("sentiment", "topic", "intent", "ner")

Run = Callable[[dict[str, Tensor]], Tensor]
"""Runs a batch of what the exported tokenizer gave, with words also ``word_shapes``: logits of texts, or of tokens."""


@dataclass(frozen=True)
class Difference:
    """How far the answers of an export are from those of its checkpoint."""

    texts: int
    """That were compared."""
    answers: int
    """Texts, or words of them for a tagging task."""
    largest: float
    """Largest absolute difference of a logit."""
    scale: float
    """Largest absolute logit of the checkpoint."""
    disagreements: int
    """Answers with another label: the best one (tagging: of each word by itself), or the set for multi-label tasks."""

    def to_dict(self) -> dict[str, Any]:
        """Return what ``export.json`` holds."""
        return asdict(self)

    def check(self, task: str) -> None:
        """Refuse an export that answers otherwise.

        Raises:
            ExportError: If a logit differs by more than rounding.
        """
        if not self.largest <= TOLERANCE * max(1.0, self.scale):  # also if it is NaN
            raise ExportError(
                f"The export of task {task!r} gives logits that differ by {self.largest:.2g} from the checkpoint's "
                f"(largest logit {self.scale:.2g}) on {self.texts} texts; allowed is {TOLERANCE:g} of the larger of "
                "that and 1. Nothing was written. Update torch, transformers and peft, or report it with the versions."
            )


def sample_texts(model: LoadedModel, task: str) -> list[Text]:
    """Choose texts to try an export on: odd ones, the task's example, and rows of its test split if they are here.

    Without data of the task, the rows are those of the bundled samples. What gives no token is left out.
    """
    spec = model.tasks[task]
    source = model.checkpoint.config.sources.get(task)
    pairs = spec.reads == "pair"
    if source is not None or (spec.files is not None and spec.files.root is not None):
        rows = _rows(spec, source)
    else:
        rows = [row for name in _BUNDLED for row in _rows(load_task(name), None)[: ROWS // len(_BUNDLED)]]
    example = [spec.example] if spec.example and not pairs else []
    if pairs:
        odd: list[Text] = list(zip(PROBE_TEXTS, reversed(PROBE_TEXTS), strict=True))
        texts = odd + [row if isinstance(row, tuple) else (row, row[::-1]) for row in rows]
    else:
        texts = [*PROBE_TEXTS, *example, *rows]
    tokenizer = model.checkpoint.model.backbone.tokenizer
    return [text for text in texts if tokenizer(*([text] if isinstance(text, str) else text))["input_ids"]]


def _rows(spec: TaskSpec, source: str | None) -> list[Text]:
    """Return the first test rows of a task as texts or pairs; none if its data has no test split, or is gone."""
    try:
        found = read(spec, data=source, splits=["test"])
    except SparseFTError:  # a sample can do without; the commands that need the data say what is wrong with it
        return []
    if "test" not in found:
        return []
    columns = found["test"].select(range(min(ROWS, len(found["test"])))).to_dict()
    rows = given_rows(columns)
    return [row if isinstance(row, (str, tuple)) else " ".join(row) for row in rows]


def given_rows(columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Return what a tokenizer is given for each row of a reader's columns: its words, a pair, or its text."""
    if "tokens" in columns and "parents" not in columns:
        return list(columns["tokens"])
    if "text_pair" in columns:
        return list(zip(columns["text"], columns["text_pair"], strict=True))
    return list(columns["text"])


def compare(model: LoadedModel, task: str, texts: Sequence[Text], *, run: Run, tokenizer: Any) -> Difference:
    """Put texts through the checkpoint and through its export.

    Args:
        model: The checkpoint.
        task: One of its tasks.
        texts: Those that a tagging task would read in several windows are left out.
        run: The export.
        tokenizer: As the export brings it.
    """
    spec = model.tasks[task]
    rows = rows_of(spec, texts)
    found = foreign_logits(rows, spec=spec, encoder=model.encoder, run=run, tokenizer=tokenizer)
    expected = model.logits([texts[place] for place in found], task)
    largest = scale = 0.0
    disagreements = answers = 0
    for ours, theirs in zip(expected, found.values(), strict=True):
        if ours.numel():
            largest = max(largest, float((ours - theirs).abs().max().nan_to_num(torch.inf)))
            scale = max(scale, float(ours.abs().max()))
        if spec.kind == "multi_label":
            other = ((ours > 0) != (theirs > 0)).any().reshape(1)
        else:
            other = (ours.argmax(-1) != theirs.argmax(-1)).reshape(-1)
        disagreements, answers = disagreements + int(other.sum()), answers + len(other)
    return Difference(len(found), answers, largest, scale, disagreements)


def rows_of(spec: TaskSpec, texts: Sequence[Text]) -> list[Any]:
    """Return what the tokenizer is given for each text: itself, a pair, or its words."""
    if find_kind(spec.kind).level == "word":
        return [[word.text for word in split_words(text, spec.language)] for text in texts if isinstance(text, str)]
    return list(texts)


def foreign_logits(
    rows: Sequence[Any], *, spec: TaskSpec, encoder: Encoder, run: Run, tokenizer: Any
) -> dict[int, Tensor]:
    """Run rows through an export, in the batches and with the calls that its user would write.

    Args:
        rows: Texts, pairs, or lists of words, by the task's kind.
        spec: The task.
        encoder: Says how long a row may be, and which piece of a word its tag stands at.
        run: The export.
        tokenizer: As the export brings it.

    Returns:
        Row number to float32 logits, (labels,) or (words, tags); without rows of words that need several windows, have
        none, or lose one in the tokenizer.
    """
    words = find_kind(spec.kind).level == "word"
    batches = _word_batches(rows, encoder=encoder, tokenizer=tokenizer) if words else _text_batches(rows, tokenizer)
    found = {}
    with torch.no_grad():
        for places, marks, batch in batches:
            logits = run(batch).float()
            for row, place in enumerate(places):
                found[place] = logits[row, marks[row]] if words else logits[row]
    return found


_Batches = Iterator[tuple[list[int], list[list[int]], dict[str, Tensor]]]


def _text_batches(rows: Sequence[Text], tokenizer: Any) -> _Batches:
    for start in range(0, len(rows), _BATCH):
        chunk = rows[start : start + _BATCH]
        first = [row if isinstance(row, str) else row[0] for row in chunk]
        pairs = [] if isinstance(chunk[0], str) else [[row[1] for row in chunk]]
        batch = tokenizer(first, *pairs, truncation=True, padding=True, return_tensors="pt")
        yield list(range(start, start + len(chunk))), [], dict(batch)


def _word_batches(rows: Sequence[Sequence[str]], *, encoder: Encoder, tokenizer: Any) -> _Batches:
    fitting: dict[int, list[int]] = {}  # row -> the piece that stands for each word
    for place, row in enumerate(rows):
        encoded = tokenizer([list(row)], is_split_into_words=True) if len(row) else None
        if encoded is None or len(encoded["input_ids"][0]) > encoder.max_length:
            continue
        marks: dict[int, int] = {}
        for position, word in enumerate(encoded.word_ids(0)):
            if word is not None and (encoder.last_piece or word not in marks):
                marks[word] = position
        if len(marks) == len(row):
            fitting[place] = [marks[word] for word in range(len(row))]
    places = list(fitting)
    for start in range(0, len(places), _BATCH):
        chosen = places[start : start + _BATCH]
        words = [list(rows[place]) for place in chosen]
        batch = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        shapes = [
            [SHAPES.index("none") if word is None else word_shape(row[word]) for word in batch.word_ids(number)]
            for number, row in enumerate(words)
        ]
        yield chosen, [fitting[place] for place in chosen], {"word_shapes": torch.tensor(shapes), **batch}
