"""Requests: a text, a pair or a text with choices, its tasks and its metadata."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas

from sparse_ft.errors import DataError
from sparse_ft.tasks.spec import TaskSpec

Text = str | tuple[str, str] | tuple[str, str | None, Sequence[str]]
"""A text; a pair of texts, or a text and a question; or a text, a question or None, and choices."""

Metadata = Mapping[str, Any]
"""What the sender of a text says of it, for rules, e.g. ``{"language": "de", "channel": "mail"}``."""

FORMS = {"text": "one text a row", "pair": "two texts a row", "choices": "choices beside one text or two"}
"""The form of a text, as ``TaskSpec.reads`` names it, in words."""

_KEYS = {"text", "text_pair", "choices", "tasks", "metadata"}
_ANSWER_KEYS = ("routing", "unknown")
"""Keys of an answer that no row may have; ``Prediction.to_dict``."""
EXPECTED = (
    'Expected {"text": "…"}, with "text_pair": "…" and "choices": ["…", "…"] as the task reads them, and if you like '
    '"tasks": ["…"] of this row, "metadata": {…} for rules, and fields of yours, which the answer repeats.'
)


@dataclass(frozen=True)
class Request:
    """A text with the tasks and the metadata that its sender gives."""

    text: Text
    tasks: str | list[str] | None = None
    """Names of the tasks of this text alone, or ``"all"``; None takes the tasks of the call."""
    metadata: Metadata = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the row, which its answer repeats."""


RequestLike = Text | Mapping[str, Any]
"""A text, or an object like a line of a .jsonl file, see ``read_request``."""

Rows = Sequence[RequestLike] | pandas.DataFrame
"""Texts or objects in order, or a table; see ``rows_of``."""


def read_request(source: RequestLike) -> Request:
    """Read a request from an object like a line of a .jsonl file, or from a text.

    Raises:
        DataError: If a key has a value of another type, or is one that only answers have.
    """
    if not isinstance(source, Mapping):
        return Request(source)
    row = dict(source)
    wrong = [*_misfits(row), *(key for key in _ANSWER_KEYS if key in row)]
    if wrong:
        value = f"{str(row[wrong[0]])[:60]!r}" if wrong[0] in row else "missing"
        raise DataError(f"The field {wrong[0]!r} of a row is {value}. {EXPECTED} Give a field of yours another name.")
    text: Text = row["text"]
    if "choices" in row:
        text = (row["text"], row.get("text_pair"), row["choices"])
    elif "text_pair" in row:
        text = (row["text"], row["text_pair"])
    fields = {key: value for key, value in row.items() if key not in _KEYS}
    return Request(text, row.get("tasks"), row.get("metadata") or {}, fields)


def _misfits(row: dict[str, Any]) -> list[str]:
    """Return the keys of a row whose values have another type than ours."""
    second, tasks = row.get("text_pair", ""), row.get("tasks", "all")
    fits = {
        "text": isinstance(row.get("text"), str),
        "text_pair": isinstance(second, str) or (second is None and "choices" in row),
        "choices": _strings(row.get("choices", [""])),
        "tasks": isinstance(tasks, str) or tasks is None or _strings(tasks),
        "metadata": isinstance(row.get("metadata", {}), Mapping | None),
    }
    return [key for key, fit in fits.items() if not fit]


def rows_of(texts: RequestLike | Iterable[RequestLike] | pandas.DataFrame) -> Iterable[RequestLike]:
    """Return the rows of what a caller gives: one text or object, many of them, or a table.

    Of a ``pandas.DataFrame``, the column ``text`` holds the texts, or its only column of strings; other columns are
    fields that the answers repeat. A missing value there is None.

    Raises:
        DataError: If a table has several columns of strings, and none is named ``text``.
    """
    if isinstance(texts, str | Mapping):
        return [texts]
    return _table_rows(texts) if isinstance(texts, pandas.DataFrame) else texts  # type: ignore[return-value]


def _table_rows(frame: pandas.DataFrame) -> list[RequestLike]:
    names = [str(name) for name in frame.columns]
    records = frame.set_axis(names, axis="columns").astype(object).where(frame.notna().to_numpy(), None)
    if "text" not in names:
        texts = [name for name in names if len(frame) and all(isinstance(value, str) for value in records[name])]
        if len(texts) != 1:
            raise DataError(
                f"The table has no column 'text'. Its columns: {', '.join(names) or 'none'}. Rename the column with "
                'the texts, e.g. frame.rename(columns={"review": "text"}).'
            )
        records = records.rename(columns={texts[0]: "text"})
    return list(records.to_dict("records"))


def _strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(entry, str) for entry in value)


def parts_of(text: Text) -> tuple[str, str | None, Sequence[str] | None]:
    """Return the text, the second text or question, and the choices; None for each that is missing."""
    if isinstance(text, str):
        return text, None, None
    return text[0], text[1], text[2] if len(text) == 3 else None


def joined(text: str, second: str | None) -> str:
    """Return the text that rules and baselines read: the one text of a row, or its two with a tab between them."""
    return text if second is None else f"{text}\t{second}"


def form_of(text: Text) -> str:
    """Return the form of a text, a key of FORMS.

    Raises:
        DataError: If the text has none of these forms, or is no Unicode.
    """
    parts: tuple[Any, ...] = (text,) if isinstance(text, str) else text if isinstance(text, tuple) else ()
    choices = parts[2] if len(parts) == 3 and isinstance(parts[2], Sequence) and not isinstance(parts[2], str) else ()
    for part in (*parts[:2], *choices):
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"The text {text!r} is no Unicode: {error}. Read it as UTF-8.") from error
    if isinstance(text, str):
        return "text"
    if len(parts) == 2 and all(isinstance(part, str) for part in parts):
        return "pair"
    if choices and isinstance(parts[0], str) and isinstance(parts[1], str | None) and _strings(list(choices)):
        return "choices"
    raise DataError(
        f"Expected a text or a pair of texts, got {type(text).__name__}: {text!r}. For multiple choice give "
        "(text, question or None, [choice, …]), all of them strings."
    )


def columns_of(spec: TaskSpec, texts: Sequence[Text]) -> dict[str, list[Any]]:
    """Sort texts into the columns that a task reads.

    Raises:
        DataError: If the task reads texts of another form.
    """
    for text in texts:
        form = form_of(text)
        if form != spec.reads:
            raise DataError(
                f"Task {spec.name!r} reads {FORMS[spec.reads]}, got {FORMS[form].split()[0]}: {text!r}. "
                "Ask only tasks that read the same (--task, or tasks=[…])."
            )
    if spec.reads == "text":
        return {"text": list(texts)}
    columns = zip(*texts, strict=True) if texts else ([], [], [])
    return dict(zip(("text", "text_pair", "choices"), map(list, columns), strict=False))
