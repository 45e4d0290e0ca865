"""What can be asked: a text, a pair or a text with choices, and what its sender says of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_ft.errors import DataError
from sparse_ft.tasks.spec import TaskSpec

Text = str | tuple[str, str] | tuple[str, str | None, Sequence[str]]
"""A text; a pair of texts for tasks on pairs, or a text and a question about it; or a text, a question or None, and
choices, for multiple choice."""

FORMS = {"text": "one text a row", "pair": "two texts a row", "choices": "choices beside one text or two"}
"""What a row is, in words, by what ``TaskSpec.reads`` calls it."""

_KEYS = {"text", "text_pair", "choices", "tasks", "metadata"}
EXPECTED = (
    'Expected {"text": "…"}, with "text_pair": "…" and "choices": ["…", "…"] as the task reads them, and if you like '
    '"tasks": ["…"] of this row and "metadata": {…} for rules.'
)


@dataclass(frozen=True)
class Request:
    """A text, and what its sender says of it."""

    text: Text
    tasks: str | list[str] | None = None
    """Of this text alone: names, or ``"all"``; None takes what is asked of all."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """For rules, e.g. ``{"language": "de", "channel": "mail"}``."""


RequestLike = Text | Mapping[str, Any]
"""A text, or an object like a line of a .jsonl file, see ``read_request``."""


def read_request(given: RequestLike) -> Request:
    """Read what a row says: an object as in a line of a .jsonl file, or only a text.

    Raises:
        DataError: If the object has other keys, or values of other types.
    """
    if not isinstance(given, Mapping):
        return Request(given)
    row = dict(given)
    if set(row) - _KEYS or not _fits(row):
        raise DataError(f"Not a row: {str(row)[:100]}. {EXPECTED}")
    text: Text = row["text"]
    if "choices" in row:
        text = (row["text"], row.get("text_pair"), row["choices"])
    elif "text_pair" in row:
        text = (row["text"], row["text_pair"])
    return Request(text, row.get("tasks"), row.get("metadata") or {})


def _fits(row: dict[str, Any]) -> bool:
    second, choices, tasks = row.get("text_pair", ""), row.get("choices", [""]), row.get("tasks", "all")
    paired = isinstance(second, str) or (second is None and "choices" in row)
    named = isinstance(tasks, str) or tasks is None or _strings(tasks)
    described = isinstance(row.get("metadata", {}), Mapping | None)
    return isinstance(row.get("text"), str) and paired and _strings(choices) and named and described


def _strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(entry, str) for entry in value)


def parts_of(text: Text) -> tuple[str, str | None, Sequence[str] | None]:
    """Return the text, the second text or question, and the choices; None for what there is not."""
    if isinstance(text, str):
        return text, None, None
    return text[0], text[1], text[2] if len(text) == 3 else None


def form_of(text: Text) -> str:
    """Tell what a text is, as ``TaskSpec.reads`` says it: a key of FORMS.

    Raises:
        DataError: If it is nothing of all these, or no Unicode.
    """
    given: tuple[Any, ...] = (text,) if isinstance(text, str) else text if isinstance(text, tuple) else ()
    chosen = given[2] if len(given) == 3 and isinstance(given[2], Sequence) and not isinstance(given[2], str) else ()
    for part in (*given[:2], *chosen):
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"The text {text!r} is no Unicode: {error}. Read it as UTF-8.") from error
    if isinstance(text, str):
        return "text"
    if len(given) == 2 and all(isinstance(part, str) for part in given):
        return "pair"
    if chosen and isinstance(given[0], str) and isinstance(given[1], str | None) and _strings(list(chosen)):
        return "choices"
    raise DataError(
        f"Expected a text or a pair of texts, got {type(text).__name__}: {text!r}. For multiple choice give "
        "(text, question or None, [choice, …]), all of them strings."
    )


def columns_of(spec: TaskSpec, texts: Sequence[Text]) -> dict[str, list[Any]]:
    """Sort texts into the columns that a task reads.

    Raises:
        DataError: If it reads something else.
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
