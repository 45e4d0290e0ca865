"""Which columns of a source are read, and the texts and labels of a record in them."""

from typing import Any, NamedTuple

from sparse_ft.errors import ConfigError, DataError, unknown_name
from sparse_ft.tasks.records import Record, pick
from sparse_ft.tasks.spec import Column, TaskSpec
from sparse_ft.tasks.values import exact_text, label_key, list_cell

_COLUMNS: dict[str, list[str]] = {
    "classification": ["text", "label"],
    "multi_label": ["text", "labels"],
    "token_classification": ["tokens", "tags"],
    "span_extraction": ["text", "text_pair", "answers"],
    "multiple_choice": ["text", "choices", "answer"],
}
"""The columns that each kind needs. ``text_pair`` is read wherever a task declares it, ``spans`` in place of tags."""


class Reading(NamedTuple):
    """How the records of one split become rows."""

    spec: TaskSpec
    columns: dict[str, Column]
    """Our column to the source's."""
    labels: dict[str, str]
    """Source values to names; a value without an entry is a name already."""
    label_scheme: str
    strict: bool = False
    """True for the train split: every row needs a label, which the task must declare if it declares any."""
    labelled: bool = True
    """False: the label column may be missing."""
    multi_hot: list[str] | None = None
    """Names of the labels of multi-label rows that hold a zero or a one for each."""


def wanted_columns(spec: TaskSpec, columns: dict[str, Column]) -> dict[str, Column]:
    """Select the columns that the kind of a task needs.

    Args:
        spec: The task.
        columns: Our column to the source's; columns without an entry have our name in the source, too.

    Returns:
        Our column to the source's, texts first.

    Raises:
        ConfigError: If the kind is unknown.
    """
    if spec.kind not in _COLUMNS:
        raise ConfigError(f"Task {spec.name!r}: {unknown_name('kind', spec.kind, _COLUMNS)}")
    ours = list(_COLUMNS[spec.kind])
    if spec.kind == "token_classification":
        has_spans = "spans" in columns or (spec.files is not None and spec.files.format == "cluener")
        ours = ["text", "spans"] if has_spans else ours
    elif "text_pair" in columns and "text_pair" not in ours:
        ours.insert(1, "text_pair")
    return {name: columns.get(name, name) for name in ours}


def fitting_columns(columns: dict[str, Column], record: Record) -> dict[str, Column]:
    """Replace columns that a record lacks by columns of our name, and tags by spans or spans by tags.

    Args:
        columns: Our column to the source's.
        record: Any record of the source.
    """
    if not isinstance(record.values, dict):
        return columns
    there = record.values
    if "tokens" in columns and "tokens" not in there and "spans" in there:
        columns = {"text": "text", "spans": "spans"}
    if "spans" in columns and "spans" not in there and "tokens" in there:
        columns = {"tokens": "tokens", "tags": "tags"}
    fitting: dict[str, Column] = {}
    for name, column in columns.items():
        parts = column if isinstance(column, list) else [column]
        fitting[name] = name if name in there and not all(part in there for part in parts) else column
    return fitting


def texts_of(record: Record, reading: Reading) -> dict[str, Any]:
    """Return ``text``, and ``text_pair`` if the task reads it.

    Raises:
        DataError: If one of them is null, or neither a string nor a number.
    """
    texts: dict[str, Any] = {}
    for name in ("text", "text_pair"):
        if name in reading.columns:
            value = pick(record, reading.columns[name])
            if value is None:
                raise DataError(f"{record.location}: {name} is null. Give every row a text, or leave the row out.")
            texts[name] = exact_text(value, name, record.location)
    return texts


def source_label(record: Record, reading: Reading, column: str, *, empty: str | None = None) -> Any:
    """Return the label as the source writes it; None if it is hidden, and ``empty`` for an empty string.

    Raises:
        DataError: If the label is missing in train, or its column in a split with labels.
    """
    try:
        value = pick(record, reading.columns[column])
    except DataError:
        if reading.labelled:
            raise
        return None
    value = empty if value == "" else value
    if value is None and reading.strict:
        raise DataError(f"{record.location}: a row of train has no {column}. Label it or leave it out.")
    return value


def source_value(value: Any, noun: str, record: Record, reading: Reading) -> str:
    """Return a label, tag or entity type as the text that stands in the source.

    Raises:
        DataError: If it is neither a string, nor a number, nor a boolean that the task declares.
    """
    if isinstance(value, str) and value and value[0] != "[":
        return value
    mapped = reading.spec.labels if isinstance(reading.spec.labels, dict) else {}
    declared = {*reading.labels, *mapped, *(reading.spec.label_names or []), *reading.spec.drop_labels}
    if isinstance(value, str) and value not in declared and list_cell(value) is not None:
        value = list_cell(value)
    return label_key(value, noun, record.location, declared)


def label_name(text: str, record: Record, reading: Reading) -> str:
    """Map a source label to its name; in train it must be a label that the task declares."""
    name = reading.labels.get(text, text)
    check_declared(name, record, reading)
    return name


def check_declared(name: str, record: Record, reading: Reading) -> None:
    """Refuse a label in train that the task does not declare.

    Raises:
        DataError: With the labels that the task declares.
    """
    known = reading.spec.label_names
    if reading.strict and known is not None and name not in known:
        raise DataError(
            f"{record.location}: {unknown_name('label', name, known)} Correct the row, or `labels` in the task file."
        )


def list_of(value: Any, column: str, record: Record) -> list[Any]:
    """Return the value of a column that must be a list without null; pandas writes lists into cells as text."""
    items = list_cell(value) if isinstance(value, str) else value
    if not isinstance(items, list) or None in items:
        raise DataError(f"{record.location}: {column} must be a list without null, not {str(value)[:60]!r}.")
    return items
