"""Reports of scores: as text for a terminal, as Markdown, as JSON, and the three as files.

Text and Markdown are two renderings of the same blocks: lines and tables.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.cells import cell_len

from sparse_ft.checkpoint.folders import write_bytes
from sparse_ft.errors import SparseFTError
from sparse_ft.evaluation.tables import markdown_table, printable, text_table
from sparse_ft.json_output import json_text, null_if_undefined
from sparse_ft.tasks.kinds.scores import Confusion, Report, Score

MAX_CONFUSED_PAIRS = 10
MAX_TEXT_MATRIX = 12
MAX_MARKDOWN_MATRIX = 30
_AVERAGES = ("accuracy", "micro avg", "macro avg", "weighted avg", "samples avg")
_SCOPE_METRICS = ("oos_precision", "oos_recall", "in_scope_accuracy")
_TOKEN_PREFIX = "token_"
# A matrix with column names that is wider than this gets column numbers instead.
_MAX_MATRIX_WIDTH = 110


@dataclass(frozen=True)
class TaskReport:
    """The scores of one task, to be reported."""

    score: Score
    title: str = ""
    """Heading; the task's name if empty."""
    unseen_rows: Score | None = None
    """The score of the rows whose text does not occur in train; None if all or none do."""


class _Line(NamedTuple):
    """A named line of facts, e.g. the headline metrics."""

    name: str
    facts: list[str]


@dataclass(frozen=True)
class _Table:
    """Columns of text, aligned left, and columns of numbers, aligned right."""

    header: list[str]
    rows: list[list[str]]
    footer: list[list[str]] = field(default_factory=list)
    num_text_columns: int = 1


def report_text(score: Score, *, title: str, unseen_rows: Score | None = None) -> str:
    """Write a report for the terminal.

    Args:
        score: The figures of the task.
        title: First line, e.g. the task's name and split.
        unseen_rows: See ``TaskReport``.

    Returns:
        Lines with aligned columns, East Asian wide characters counted as two; ends with a newline.
    """
    heading = f"{printable(title)} ({_count(score.n)} {_rows_word(score)})"
    parts = [heading + "\n" + "=" * cell_len(heading)]
    for block in _blocks(score, unseen_rows=unseen_rows, max_matrix=MAX_TEXT_MATRIX):
        parts.append(_text_line(block) if isinstance(block, _Line) else "\n" + _text_table(block))
    return "\n".join(parts) + "\n"


def report_markdown(score: Score, *, title: str, unseen_rows: Score | None = None) -> str:
    """Write the report as Markdown, with the same content and a confusion matrix for more labels.

    Args:
        score: The figures of the task.
        title: Second-level heading.
        unseen_rows: See ``TaskReport``.
    """
    parts = [f"## {_escaped(title)} ({_count(score.n)} {_rows_word(score)})"]
    for block in _blocks(score, unseen_rows=unseen_rows, max_matrix=MAX_MARKDOWN_MATRIX):
        parts.append(_markdown_line(block) if isinstance(block, _Line) else _markdown_table(block))
    return "\n\n".join(parts) + "\n"


def report_json(score: Score, *, unseen_rows: Score | None = None) -> dict[str, Any]:
    """Return the report as a JSON object.

    Args:
        score: The figures of the task.
        unseen_rows: See ``TaskReport``.

    Returns:
        ``n``, ``metrics`` and ``report``, and those of ``token_report``, ``confusion``, ``unseen_labels`` and
        ``unseen_rows`` that the task has. A metric without a value is None.
    """
    content: dict[str, Any] = {"n": score.n, "metrics": null_if_undefined(score.metrics), "report": score.report}
    if score.token_report is not None:
        content["token_report"] = score.token_report
    if score.confusion is not None:
        content["confusion"] = {"labels": score.confusion.labels, "matrix": score.confusion.matrix}
    if score.unseen_labels:
        content["unseen_labels"] = score.unseen_labels
    if unseen_rows is not None:
        content["unseen_rows"] = {"n": unseen_rows.n, "metrics": null_if_undefined(unseen_rows.metrics)}
    return content


def write_report(
    directory: str | Path,
    tasks: Mapping[str, TaskReport],
    *,
    about: Mapping[str, str] | None = None,
    routing: Mapping[str, Any] | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """Write ``report.txt``, ``report.md``, ``report.json`` and pictures, each completely or not at all.

    Args:
        directory: Folder to write into; created if missing.
        tasks: Task name to its report, in the order of the files.
        about: The origin of the scores, e.g. ``checkpoint``, ``split`` and ``route``; top keys of the JSON.
        routing: The routing report, written to the JSON unchanged.
        pictures: File name to PNG; the Markdown links to each.

    Returns:
        The paths of the three files, and of the pictures.

    Raises:
        SparseFTError: If the folder or a file cannot be written.
    """
    folder = Path(directory)
    pictures = pictures or {}
    texts = {
        "report.txt": _text_file(tasks, about=about or {}),
        "report.md": _markdown_file(tasks, about=about or {}, pictures=list(pictures)),
        "report.json": _json_file(tasks, about=about or {}, routing=routing),
    }
    # A label out of JSON may hold half a surrogate pair, which UTF-8 cannot; the escape is valid JSON.
    contents = {name: text.encode("utf-8", errors="backslashreplace") for name, text in texts.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**pictures, **contents}.items():  # linked files come first
            write_bytes(folder / name, content)
    except OSError as error:
        raise SparseFTError(
            f"The report cannot be written to {str(folder)!r}: {error.strerror or error}. Expected a folder that can "
            "be created and written to; give another one, or change its permissions."
        ) from error
    return [folder / name for name in (*contents, *pictures)]


def _text_file(tasks: Mapping[str, TaskReport], *, about: Mapping[str, str]) -> str:
    reports = [
        report_text(task.score, title=task.title or name, unseen_rows=task.unseen_rows) for name, task in tasks.items()
    ]
    facts = "".join(f"{name}: {printable(value)}\n" for name, value in about.items())
    return "\n\n".join([facts, *reports] if facts else reports)


def _markdown_file(tasks: Mapping[str, TaskReport], *, about: Mapping[str, str], pictures: Sequence[str]) -> str:
    reports = [
        report_markdown(task.score, title=task.title or name, unseen_rows=task.unseen_rows)
        for name, task in tasks.items()
    ]
    facts = "".join(f"- {name}: {_escaped(value)}\n" for name, value in about.items())
    shown = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" for name in pictures]
    return "\n".join(
        ["# Report\n", *([facts] if facts else []), *reports, *(["## Pictures\n"] if shown else []), *shown]
    )


def _json_file(tasks: Mapping[str, TaskReport], *, about: Mapping[str, str], routing: Mapping[str, Any] | None) -> str:
    entries = {name: report_json(task.score, unseen_rows=task.unseen_rows) for name, task in tasks.items()}
    content = {**about, "tasks": entries, **({} if routing is None else {"routing": routing})}
    return json_text(content) + "\n"


def _blocks(score: Score, *, unseen_rows: Score | None, max_matrix: int) -> list[_Line | _Table]:
    """Return the blocks of a report, in reading order."""
    blocks: list[_Line | _Table] = [*_metric_lines("metrics", score)]
    if score.out_of_scope is not None:
        blocks.append(_scope_line(score))
    if unseen_rows is not None:
        name = f"only the {_count(unseen_rows.n)} {_rows_word(unseen_rows)} whose text is not in train"
        blocks.extend(_metric_lines(name, unseen_rows))
    if score.unseen_labels:
        blocks.append(_unseen_line(score))
    if score.report:
        blocks.append(_report_table("entities" if score.token_report is not None else "labels", score.report))
    if score.token_report is not None:
        blocks.append(_report_table("tags", score.token_report))
    if score.confusion is not None:
        blocks.extend(_confusion_tables(score.confusion, max_matrix=max_matrix))
    return blocks


def _rows_word(score: Score) -> str:
    noun = "row" if score.token_report is None else "sentence"
    return noun if score.n == 1 else noun + "s"


def _metric_lines(name: str, score: Score) -> list[_Line]:
    """Return the headline figures in one line, those over tags in a second line."""
    shown = {key: _number(value) for key, value in score.metrics.items() if key not in _SCOPE_METRICS}
    lines = [_Line(name, [f"{key} {value}" for key, value in shown.items() if not key.startswith(_TOKEN_PREFIX)])]
    if score.token_report is not None:
        facts = [f"{key} {value}" for key, value in shown.items() if key.startswith(_TOKEN_PREFIX)]
        lines.append(_Line(f"{name}, per tag", facts))
    return lines


def _unseen_line(score: Score) -> _Line:
    report = score.report if score.token_report is None else score.token_report
    rows = {label: report[label] for label in score.unseen_labels}
    # A label named "accuracy" has no row of its own in scikit-learn's layout.
    counts = {label: f" ({_count(row['support'])})" if isinstance(row, dict) else "" for label, row in rows.items()}
    return _Line("not in train, counted as errors", [label + count for label, count in counts.items()])


def _scope_line(score: Score) -> _Line:
    precision, recall, accuracy = (_number(score.metrics[key]) for key in _SCOPE_METRICS)
    return _Line(
        f"out of scope ({score.out_of_scope})",
        [f"precision {precision}", f"recall {recall}", f"accuracy in scope {accuracy}"],
    )


def _report_table(what: str, report: Report) -> _Table:
    rows: list[list[str]] = []
    footer: list[list[str]] = []
    total = report["weighted avg"]["support"]
    for name, figures in report.items():
        if isinstance(figures, dict):
            cells = [_number(figures[key]) for key in ("precision", "recall", "f1-score")]
            cells = [printable(name), *cells, _count(figures["support"])]
        else:
            cells = [name, "", "", _number(figures), _count(total)]
        (footer if name in _AVERAGES else rows).append(cells)
    return _Table([what, "precision", "recall", "f1-score", "support"], rows, footer)


def _confusion_tables(confusion: Confusion, *, max_matrix: int) -> list[_Table]:
    tables = []
    pairs = _confused_pairs(confusion)
    if pairs:
        header = ["most confused", "predicted as", "rows", "share of label"]
        tables.append(_Table(header, pairs, num_text_columns=2))
    if 1 < len(confusion.labels) <= max_matrix:
        tables.append(_matrix_table(confusion))
    return tables


def _confused_pairs(confusion: Confusion) -> list[list[str]]:
    """List the most frequent errors: reference, prediction, rows, share of the reference's rows."""
    pairs = [
        (count, row, column)
        for row, counts in enumerate(confusion.matrix)
        for column, count in enumerate(counts)
        if count and row != column
    ]
    pairs.sort(key=_most_first)
    names = [printable(label) for label in confusion.labels]
    return [
        [names[row], names[column], _count(count), _number(count / sum(confusion.matrix[row]))]
        for count, row, column in pairs[:MAX_CONFUSED_PAIRS]
    ]


def _most_first(pair: tuple[int, int, int]) -> tuple[int, int, int]:
    count, row, column = pair
    return -count, row, column


def _matrix_table(confusion: Confusion) -> _Table:
    """Lay out the matrix; column names that would make it too wide are replaced by the numbers of their rows."""
    corner = "reference \\ predicted"
    names = [printable(label) for label in confusion.labels]
    columns = names
    if sum(max(cell_len(name), 5) + 2 for name in names) + max(map(cell_len, names)) > _MAX_MATRIX_WIDTH:
        columns = [str(number) for number in range(1, len(names) + 1)]
        names = [f"{number:>2} {name}" for number, name in enumerate(names, start=1)]
    rows = [[name, *map(_count, counts)] for name, counts in zip(names, confusion.matrix, strict=True)]
    return _Table([corner, *columns], rows)


def _number(value: float) -> str:
    return f"{value:.3f}"


def _count(value: float) -> str:
    return f"{int(value):,}"


def _escaped(text: str) -> str:
    """Escape what Markdown would read as markup inside a table cell."""
    return re.sub(r"([\\|*`<\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", printable(text))


def _text_line(line: _Line) -> str:
    return f"{printable(line.name)}: " + "  ".join(map(printable, line.facts))


def _text_table(table: _Table) -> str:
    columns = table.num_text_columns
    lines = text_table(table.header, table.rows, table.footer, num_text_columns=columns, min_width=5, ruled=True)
    return "\n".join(lines)


def _markdown_line(line: _Line) -> str:
    return f"**{_escaped(line.name)}:** " + ", ".join(map(_escaped, line.facts))


def _markdown_table(table: _Table) -> str:
    header, *rows = [
        [_escaped(cell) if cell else "" for cell in cells] for cells in [table.header, *table.rows, *table.footer]
    ]
    return "\n".join(markdown_table(header, rows, num_text_columns=table.num_text_columns))
