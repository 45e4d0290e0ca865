"""Rows of a task with answers, encoded for a backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import TaskSpec


@dataclass(frozen=True)
class EncodedRows:
    """Rows of one task, all with answers."""

    columns: dict[str, list[Any]]
    """The rows as ``reading.read`` returns them, column by column."""
    examples: list[Example]
    """Model input, one or several examples a row."""
    num_parts: list[int] | None
    """Words or choices of each row, for tasks with logits for these; else None."""
    row_examples: list[Example]
    """One example a row, the input of a gate for texts."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.columns["row"])

    def take(self, rows: Sequence[int]) -> "EncodedRows":
        """Select different rows by their indices, which are ascending."""
        if len(rows) == self.num_rows:
            return self
        indices = {row: index for index, row in enumerate(rows)}
        return EncodedRows(
            {name: [values[row] for row in rows] for name, values in self.columns.items()},
            [replace(example, row=indices[example.row]) for example in self.examples if example.row in indices],
            None if self.num_parts is None else [self.num_parts[row] for row in rows],
            [replace(self.row_examples[row], row=index) for index, row in enumerate(rows)],
        )


def encode_rows(columns: Mapping[str, Sequence[Any]], *, spec: TaskSpec, encoder: Encoder) -> EncodedRows:
    """Encode the rows that have answers; rows with hidden answers are left out.

    Args:
        columns: The columns that ``reading.read`` returns.
        spec: The task, with its labels filled in.
        encoder: Encoder of the backbone.
    """
    kind = find_kind(spec.kind)
    answered = [row for row, answer in enumerate(columns[kind.answer_column]) if answer is not None]
    rows = {name: [values[row] for row in answered] for name, values in columns.items()}
    examples = kind.encode(rows, encoder=encoder, labels=spec.label_names or [], language=spec.language)
    row_examples = examples_by_row(examples, rows, spec=spec, encoder=encoder)
    return EncodedRows(rows, examples, kind.num_parts(rows, language=spec.language), row_examples)


def examples_by_row(
    examples: Sequence[Example], columns: Mapping[str, Sequence[Any]], *, spec: TaskSpec, encoder: Encoder
) -> list[Example]:
    """Return one example a row, in the form in which ``predict`` shows a text to a gate that does not know the task.

    Of a long text it holds the beginning. Questions are included, choices are not.

    Args:
        examples: The rows as encoded by the task's kind, one or several examples each.
        columns: The same rows.
        spec: The task.
        encoder: Encoder of the backbone.
    """
    if spec.reads == "text":
        first = {example.row: example for example in reversed(examples)}
        (empty,) = encoder.texts([""])  # for a row without words
        rows = range(len(next(iter(columns.values()))))
        return [first[row] if row in first else replace(empty, row=row) for row in rows]
    if not find_kind(spec.kind).grouped:
        return list(examples)
    seconds = columns.get("text_pair") or [None] * len(columns["text"])
    return encoder.texts(list(columns["text"]), [second or "" for second in seconds])
