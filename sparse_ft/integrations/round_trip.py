"""Check that an export gives the answers of its checkpoint: the same texts through both, logit by logit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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
"""Largest allowed difference of a logit, as a share of the larger of 1 and the largest logit; float32 sums in another
order give 1e-6."""
ROWS = 32
"""Rows of the task's data that are compared, besides the odd texts."""
_BATCH = 16

_BUNDLED = ("sentiment", "topic", "intent", "ner")

Run = Callable[[dict[str, Tensor]], Tensor]
"""Maps a batch of the exported tokenizer, with ``word_shapes`` for words, to logits of texts or of tokens."""


@dataclass(frozen=True)
class Difference:
    """Distance of the answers of an export from those of its checkpoint."""

    texts: int
    """Number of texts that were compared."""
    answers: int
    """Number of texts, or of their words for a tagging task."""
    largest: float
    """Largest absolute difference of a logit."""
    scale: float
    """Largest absolute logit of the checkpoint."""
    disagreements: int
    """Answers with another best label (tagging: for each word by itself), or another set in a multi-label task."""

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``export.json``."""
        return asdict(self)

    def check(self, task: str) -> None:
        """Refuse an export with other answers.

        Raises:
            ExportError: If a logit differs by more than rounding.
        """
        if not self.largest <= TOLERANCE * max(1.0, self.scale):  # also if it is NaN
            raise ExportError(
                f"The export of task {task!r} gives logits that differ by {self.largest:.2g} from the checkpoint's "
                f"(largest logit {self.scale:.2g}) on {self.texts} texts; allowed is {TOLERANCE:g} of the larger of "
                "that and 1. Nothing was written. Update torch, transformers and peft, or report it with the versions."
            )


def _sample_texts(model: LoadedModel, task: str) -> list[Text]:
    """Choose texts to compare: odd ones, the task's example, and rows of its test split if they are here.

    A task without data takes rows of the bundled samples. Texts without tokens are left out.
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
    encoder = model.encoder

    def has_tokens(text: Text) -> bool:
        read = encoder.texts([text]) if isinstance(text, str) else encoder.texts([text[0]], [text[1] or ""])
        return read[0].input_ids != [encoder.empty_id]

    return list(filter(has_tokens, texts))


def _rows(spec: TaskSpec, source: str | None) -> list[Text]:
    """Return the first test rows of a task as texts or pairs; none if its data is missing or has no test split."""
    try:
        test = read(spec, data=source, splits=["test"]).get("test")
    except SparseFTError:  # rows are optional here; the commands that need them report what is wrong with the data
        return []
    if test is None:
        return []
    rows = rows_of_columns(test.select(range(min(ROWS, len(test)))).to_dict())
    return [row if isinstance(row, (str, tuple)) else " ".join(row) for row in rows]


def rows_of_columns(columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Return the tokenizer's input for each row of a reader's columns: its words, a pair, or its text."""
    if "tokens" in columns and "parents" not in columns:
        return list(columns["tokens"])
    if "text_pair" in columns:
        return list(zip(columns["text"], columns["text_pair"], strict=True))
    return list(columns["text"])


def compare(model: LoadedModel, task: str, *, run: Run, tokenizer: Any) -> Difference:
    """Put sample texts through the checkpoint and through its export.

    Texts that a tagging task reads in several windows are left out.

    Args:
        model: The checkpoint.
        task: One of its tasks.
        run: The export.
        tokenizer: Tokenizer of the export.
    """
    spec, texts = model.tasks[task], _sample_texts(model, task)
    rows = rows_of_texts(spec, texts)
    logits = foreign_logits(rows, spec=spec, encoder=model.encoder, run=run, tokenizer=tokenizer)
    expected = model.logits([texts[index] for index in logits], task)
    largest = scale = 0.0
    disagreements = answers = 0
    for ours, theirs in zip(expected, logits.values(), strict=True):
        if ours.numel():
            largest = max(largest, float((ours - theirs).abs().max().nan_to_num(torch.inf)))
            scale = max(scale, float(ours.abs().max()))
        if spec.kind == "multi_label":
            other = ((ours > 0) != (theirs > 0)).any().reshape(1)
        else:
            other = (ours.argmax(-1) != theirs.argmax(-1)).reshape(-1)
        disagreements, answers = disagreements + int(other.sum()), answers + len(other)
    return Difference(len(logits), answers, largest, scale, disagreements)


def rows_of_texts(spec: TaskSpec, texts: Sequence[Text]) -> list[Any]:
    """Return the tokenizer's input for each text: the text, a pair, or its words."""
    if find_kind(spec.kind).level == "word":
        return [[word.text for word in split_words(text, spec.language)] for text in texts if isinstance(text, str)]
    return list(texts)


def foreign_logits(
    rows: Sequence[Any], *, spec: TaskSpec, encoder: Encoder, run: Run, tokenizer: Any
) -> dict[int, Tensor]:
    """Run rows through an export with the calls that its user would write.

    Args:
        rows: Texts, pairs, or lists of words, by the task's kind.
        spec: The task.
        encoder: Knows the longest row, and which piece of a word has its tag.
        run: The export.
        tokenizer: Tokenizer of the export.

    Returns:
        Index of a row to its float32 logits, (labels,) or (words, tags). Rows of words are left out if they need
        several windows, have no words, or lose one in the tokenizer.
    """
    words = find_kind(spec.kind).level == "word"
    batches = _word_batches(rows, encoder=encoder, tokenizer=tokenizer) if words else _text_batches(rows, tokenizer)
    by_row = {}
    with torch.no_grad():
        for batch in batches:
            logits = run(batch.inputs).float()
            for row, index in enumerate(batch.indices):
                by_row[index] = logits[row, batch.positions[row]] if words else logits[row]
    return by_row


class _Batch(NamedTuple):
    indices: list[int]
    """Indices of the rows."""
    positions: list[list[int]]
    """For rows of words: the position of the token that has the tag of each word."""
    inputs: dict[str, Tensor]


def _text_batches(rows: Sequence[Text], tokenizer: Any) -> Iterator[_Batch]:
    for start in range(0, len(rows), _BATCH):
        chunk = rows[start : start + _BATCH]
        first = [row if isinstance(row, str) else row[0] for row in chunk]
        pairs = [] if isinstance(chunk[0], str) else [[row[1] for row in chunk]]
        batch = tokenizer(first, *pairs, truncation=True, padding=True, return_tensors="pt")
        yield _Batch(list(range(start, start + len(chunk))), [], dict(batch))


def _word_batches(rows: Sequence[Sequence[str]], *, encoder: Encoder, tokenizer: Any) -> Iterator[_Batch]:
    positions = {
        index: tagged
        for index, row in enumerate(rows)
        if (tagged := _word_positions(row, encoder=encoder, tokenizer=tokenizer)) is not None
    }
    for start in range(0, len(positions), _BATCH):
        indices = list(positions)[start : start + _BATCH]
        words = [list(rows[index]) for index in indices]
        batch = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        shapes = [
            [SHAPES.index("none") if word is None else word_shape(row[word]) for word in batch.word_ids(number)]
            for number, row in enumerate(words)
        ]
        yield _Batch(indices, [positions[index] for index in indices], {"word_shapes": torch.tensor(shapes), **batch})


def _word_positions(row: Sequence[str], *, encoder: Encoder, tokenizer: Any) -> list[int] | None:
    """Return the position of the token that has the tag of each word; None if the row is too long or loses a word."""
    encoded = tokenizer([list(row)], is_split_into_words=True) if len(row) else None
    if encoded is None or len(encoded["input_ids"][0]) > encoder.max_length:
        return None
    positions: dict[int, int] = {}
    for position, word in enumerate(encoded.word_ids(0)):
        if word is not None and (encoder.last_piece or word not in positions):
            positions[word] = position
    return [positions[word] for word in range(len(row))] if len(positions) == len(row) else None
