"""Read JSON: one object a line, one list, or SQuAD's articles. Knows nothing of tasks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_ft.documents import parse_json
from sparse_ft.errors import DataError, name_list
from sparse_ft.tasks.records import QUESTION, FileOptions, Record, read_text, text_lines


def read_jsonl(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield one record a line."""
    for number, line in text_lines(path):
        if line.strip():
            row = _checked_row(_parse(line, f"{str(path)!r}, line {number}"), path, number)
            yield Record(row, str(path), number)


def read_json(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield the items of a JSON list, or of the list under one key of an object: its only one, or ``options.key``."""
    content = load_json(path)
    if options.key is not None:
        if not isinstance(content, dict) or options.key not in content:
            keys = name_list(list(content)) if isinstance(content, dict) else "none, it is a list"
            raise DataError(
                f"{str(path)!r} has no key {options.key!r}. Its keys: {keys}. Correct the part after # in the name."
            )
        content = content[options.key]
    wanted = {str(column) for column in (*options.columns, *options.columns.values())}
    if isinstance(content, dict):
        _refuse_columns(content, path)
        content = _list_within(content, path) if wanted.isdisjoint(content) else content  # else it is a row
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, start=1):
        yield Record(_checked_row(row, path, number), str(path), number, "record")


def _list_within(content: dict[str, Any], path: Path) -> dict[str, Any] | list[Any]:
    """Return the only list of an object, such as that under ``data``; an object without lists is a row itself."""
    lists = [name for name, value in content.items() if isinstance(value, list)]
    if len(lists) == 1 and all(isinstance(row, dict | list) for row in content[lists[0]]):
        return list(content[lists[0]])
    if lists:
        raise DataError(
            f"{str(path)!r} is an object with the keys {name_list(list(content))}. Choose one: {path.name}#KEY. "
            "Expected a list of rows under it."
        )
    return content


def _refuse_columns(content: dict[str, Any], path: Path) -> None:
    if content and all(isinstance(value, dict) for value in content.values()):
        raise DataError(
            f"{str(path)!r} holds columns ({name_list(list(content))}), not rows. Expected a list of rows, which "
            "pandas writes with to_json(orient='records')."
        )


def holds_lines(text: str) -> bool:
    """Whether a text has one JSON value a line, and is not one document that holds a list of rows."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return first.startswith("{") and rest.lstrip().startswith("{")  # a broken line is reported as such
    if rest.strip():
        return True
    values = row.values() if isinstance(row, dict) else [row]
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return not any(isinstance(item, dict | list) for item in items)


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        DataError: If it is not JSON, with line and column.
    """
    return _parse(read_text(path), repr(str(path)))


def _parse(text: str, location: str) -> Any:
    return parse_json(text, location, written=True, error=_no_rows)


def _no_rows(problem: str) -> DataError:
    return DataError(f"{problem} Expected one object a line (jsonl) or one list (json).")


def _checked_row(row: Any, path: Path, number: int) -> dict[str, Any] | list[Any]:
    if not isinstance(row, dict | list):
        raise DataError(f"{str(path)!r}, row {number}: expected a JSON object or list, found {row!r}.")
    return row


def read_squad(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``context``, ``question``, ``answers`` and ``id`` of each question of SQuAD, CMRC 2018 and DRCD.

    Answers are ``{"text", "answer_start"}``, as in
    https://github.com/ymcui/cmrc2018/tree/c0eb1b6ba219847457e6af3180da722bbeb656af/squad-style-data
    """
    number = 0
    for article in _member(load_json(path), "data", path, "an object"):
        for paragraph in _member(article, "paragraphs", path, f"the article after question {number}"):
            for question in _member(paragraph, "qas", path, f"the paragraph after question {number}"):
                number += 1
                values = {**question, "context": _member(paragraph, "context", path, f"the paragraph of {number}")}
                yield Record(values, str(path), number, QUESTION)


def _member(values: Any, name: str, path: Path, where: str) -> Any:
    if not isinstance(values, dict) or name not in values:
        raise DataError(
            f"{str(path)!r}: {where} has no {name!r}. Expected the shape of SQuAD: data, paragraphs, context, qas, "
            "answers. Check that it is the right file."
        )
    return values[name]
