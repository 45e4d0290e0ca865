"""Write answers to a file, as JSON Lines or CSV: whole or not at all."""

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_ft.errors import ConfigError, DataError
from sparse_ft.json_output import json_text
from sparse_ft.paths import output_path, user_path

if TYPE_CHECKING:
    from sparse_ft.tasks.kinds.answers import Answer, Prediction

_FORMATS = (".jsonl", ".csv")


def check_answer_file(output: Path, *, source: str | None) -> Path:
    """Return the absolute path of a file for answers.

    Args:
        output: As the user wrote it.
        source: The file that is read, if one is.

    Raises:
        ConfigError: If it cannot be written, is the file that is read, or its name ends otherwise.
    """
    if output.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--output {str(output)!r} ends in neither .jsonl nor .csv. Give it one of these endings.")
    path = output_path(output, room=len("..new"))
    if path.is_dir():
        raise ConfigError(f"--output {str(output)!r} is a folder. Give the name of a file.")
    if source not in (None, "-") and path == user_path(source or "").resolve():
        raise ConfigError(f"--output {str(output)!r} is the file that is read. Give another name.")
    return path


@contextlib.contextmanager
def answer_file(path: Path, *, tasks: Sequence[str]) -> Iterator[Callable[["Prediction"], None]]:
    """Give a function that appends one answer to a file; the file replaces an old one when all are written.

    Args:
        path: As ``check_answer_file`` returned it.
        tasks: Tasks that may be answered; a CSV file has columns for each.
    """
    from sparse_ft.checkpoint.folders import explain_os_errors, written_file

    with explain_os_errors(path), written_file(path) as stream:
        table = _Table(tasks)
        as_line = table.line if path.suffix.lower() == ".csv" else _json_line
        yield lambda prediction: _write(stream, as_line(prediction))
        if path.suffix.lower() == ".csv" and table.columns is None:
            _write(stream, table.header([]))


def _write(stream: Any, text: str) -> None:
    stream.write(text.encode())


def _json_line(prediction: "Prediction") -> str:
    return json_text(prediction.to_dict()) + "\n"


class _Table:
    """Turns predictions into rows of one table, whose columns come from the first row.

    A task has a column of its own name; a label, an answer and a choice have a second one, ``TASK_score``. Several
    labels, and entities, stand in one cell as JSON. Cells of tasks that were not answered are empty.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tasks
        self.columns: list[str] | None = None

    def header(self, fields: Sequence[str]) -> str:
        """Choose the columns: the fields of a row, its texts, and the tasks."""
        answers = [column for task in self.tasks for column in (task, f"{task}_score")]
        self.columns = [*fields, *answers]
        twice = [column for column in fields if column in answers]
        if twice:
            raise DataError(
                f"The field {twice[0]!r} of the rows is also the name of a task's column. Rename it, or write .jsonl."
            )
        return _csv_line(self.columns)

    def line(self, prediction: "Prediction") -> str:
        """Return a prediction as a line, the first with the header."""
        texts = {key: value for key, value in prediction.to_dict().items() if key not in ("tasks", "routing")}
        row = {key: value if isinstance(value, str) else _cell(value) for key, value in texts.items()}
        row.pop("unknown", None)  # all its tasks are empty
        header = self.header(list(row)) if self.columns is None else ""
        for task, answer in prediction.tasks.items():
            row |= _cells(task, answer)
        further = [column for column in row if column not in (self.columns or [])]
        if further:
            raise DataError(
                f"The row {prediction.text[:60]!r} has {further[0]!r}, for which the table has no column. A .csv file "
                "has the fields of the first row and the tasks that --task names; write .jsonl."
            )
        return header + _csv_line([row.get(column, "") for column in self.columns or []])


def _cells(task: str, answer: "Answer") -> dict[str, str]:
    if "label" in answer:
        return {task: answer["label"], f"{task}_score": str(answer["score"])}
    if "answer" in answer:
        return {task: answer["answer"], f"{task}_score": str(answer["score"])}
    return {task: json_text(answer["labels"] if "labels" in answer else answer["entities"])}


def _cell(value: Any) -> str:
    return "" if value is None else json_text(value)


def _csv_line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
