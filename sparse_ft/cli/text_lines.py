"""Lines of text in, predictions out."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparse_ft.documents import parse_json
from sparse_ft.errors import DataError
from sparse_ft.prediction.requests import EXPECTED, read_request

if TYPE_CHECKING:
    from sparse_ft.tasks.kinds.answers import Answer, Prediction

_MOST_NAMES = 4
"""Tasks that a line names."""


def read_texts(source: str) -> Iterator[str]:
    r"""Yield the lines of a file, or of standard input for ``-``, without their line ends.

    Only ``\n`` (and ``\r\n``) ends a line: texts may hold U+2028 and its kin. An empty line is an empty text.

    Raises:
        DataError: If the file is missing, or a line is not UTF-8.
    """
    if source == "-":
        yield from _lines(sys.stdin.buffer, "standard input")
        return
    path = Path(source)
    if not path.exists() or path.is_dir():  # a pipe will do
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"File {source!r} {problem}. Give a file with one text a line, or - for standard input.")
    try:
        with path.open("rb") as stream:
            yield from _lines(stream, repr(source))
    except PermissionError as error:
        raise DataError(f"File {source!r} may not be read: {error.strerror}.") from error


def read_rows(lines: Iterable[str], *, form: Literal["text", "pair", "json"]) -> Iterator[Any]:
    """Yield what ``LoadedModel.predict`` takes for each line.

    Args:
        lines: Without their ends.
        form: ``text``: a line is a text; ``pair``: it may hold two, with a tab between them; ``json``: it is an object
            with ``text``, and as the task needs them ``text_pair`` and ``choices``; blank lines are passed over.

    Raises:
        DataError: If a line is no such object.
    """
    for number, line in enumerate(lines, start=1):
        if form == "json":
            if line.strip():
                yield _parsed(line, number)
        else:
            yield tuple(line.split("\t", 1)) if form == "pair" and "\t" in line else line


def _parsed(line: str, number: int) -> Any:
    row = parse_json(line, f"Line {number}", error=lambda problem: DataError(f"{problem} {line[:60]!r}. {EXPECTED}"))
    try:
        read_request(row if isinstance(row, dict) else {})
    except DataError as error:
        raise DataError(f"Line {number} is not such a row: {line[:60]!r}. {EXPECTED}") from error
    return row


def _lines(stream: Any, name: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"Line {number} of {name} is not UTF-8 (byte {error.start}). Convert the file to UTF-8."
            ) from error
        yield text.removesuffix("\n").removesuffix("\r")


def format_prediction(prediction: "Prediction") -> str:
    """Show the answers to one text for people: the text, then a line a task."""
    parts = [prediction.text, prediction.text_pair, *(prediction.choices or [])]
    lines = ["\t".join(part for part in parts if part is not None)]
    if prediction.unknown:
        return f"{lines[0]}\n  unknown: no expert is for such a text"
    width = max((len(task) for task in prediction.tasks), default=0)
    lines.extend(f"  {task:<{width}}  {_format_answer(answer)}" for task, answer in prediction.tasks.items())
    if prediction.left_out:
        lines.append(f"  not answered: {_listed(prediction.left_out)}")
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    """List names; of many the first and the number of further ones."""
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{names[0]} and {len(names) - 1} others"


def _format_answer(answer: "Answer") -> str:
    if "label" in answer:
        return f"{answer['label']} ({answer['score']:.2f})"
    if "answer" in answer:
        return f"{answer['answer']} [{answer['start']}-{answer['end']}] ({answer['score']:.2f})"
    if "labels" in answer:
        return ", ".join(f"{entry['label']} ({entry['score']:.2f})" for entry in answer["labels"]) or "none"
    entities = [
        f"{entry['text']} [{entry['type']} {entry['start']}-{entry['end']}] ({entry['score']:.2f})"
        for entry in answer["entities"]
    ]
    return ", ".join(entities) or "no entities"
