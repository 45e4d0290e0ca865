"""Read one file that holds all rows of a task, in whatever format its suffix and its first line say."""

from pathlib import Path

from sparse_ft.errors import DataError
from sparse_ft.tasks.columns import fitting_columns, wanted_columns
from sparse_ft.tasks.formats import read_file, record_columns
from sparse_ft.tasks.json_formats import holds_lines
from sparse_ft.tasks.records import FileOptions, Record, locate, read_text
from sparse_ft.tasks.spec import Column, TaskSpec

SUFFIXES: dict[str, tuple[str, ...]] = {
    ".csv": ("csv",),
    ".tsv": ("tsv", "conll"),
    ".txt": ("tsv", "conll"),
    ".conll": ("conll",),
    ".bio": ("conll",),
    ".bmes": ("conll",),
    ".jsonl": ("jsonl", "cluener", "cluewsc"),
    ".json": ("jsonl", "json", "cluener", "cluewsc", "squad", "c3", "chid"),
    ".parquet": ("parquet",),
}
"""Formats that a file of each suffix may have: the task's own if it is listed, else the first that fits its kind."""


def read_single(spec: TaskSpec, path: Path) -> tuple[list[Record], dict[str, Column]]:
    """Read all rows of a file whose columns may have the source's names or ours.

    Returns:
        The records, and our column to theirs.
    """
    columns = wanted_columns(spec, spec.columns)
    file = locate(path.parent, path.name.partition("#")[0])
    format = _format_of(spec, file)
    if format == "conll":
        positions = {"tokens": 0, "tags": -1} if spec.kind == "token_classification" else {}
        columns = {
            name: column if isinstance(column, int) else positions.get(name, column) for name, column in columns.items()
        }
    separator = _separator(spec, file) if format == "conll" else None
    header = (spec.files is not None and spec.files.header) or None  # another file may have one where the task's do not
    options = FileOptions(columns, separator=separator, header=header)
    records = read_file(path.parent, path.name, format=format, options=options)
    return records, fitting_columns(record_columns(format, columns), records[0])


def _format_of(spec: TaskSpec, file: Path) -> str:
    """Decide the format of a file by its suffix and by the task, and where both leave it open by its first line."""
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    declared = spec.files.format if spec.files is not None else None
    known = SUFFIXES.get(suffix, ())
    if known == ("parquet",):
        return "parquet"
    first_line = read_text(file).partition("\n")[0] if known or declared else ""
    if not known and (declared in {None, "lines", "parquet"} or "\0" in first_line):
        raise DataError(
            f"The format of {str(file)!r} cannot be told by its suffix {suffix!r}. "
            f"Expected one of {', '.join(SUFFIXES)} (each also with .gz). "
            "Rename the file, or give a folder and name its format in the task file."
        )
    if not known:
        return str(declared)
    if suffix == ".json" and declared not in {"json", "squad", "c3"} and first_line.lstrip().startswith("["):
        return "json"
    if suffix == ".json" and declared not in known and not holds_lines(read_text(file)):
        return "json"
    tagging = spec.kind == "token_classification"
    if tagging and "conll" in known and not {"tokens", "text"} & set(first_line.strip().split("\t")):
        return "conll"
    return declared if declared in known and declared != "conll" else known[0]


def _separator(spec: TaskSpec, file: Path) -> str | None:
    """Return the task's separator if the first line with columns has it, else a tab if it has one, else None."""
    lines = (line for line in read_text(file).split("\n") if line.strip() and not line.startswith(("-DOCSTART-", "# ")))
    first_line = next(lines, "")
    declared = spec.files.separator if spec.files is not None else None
    return next((mark for mark in (declared, "\t") if mark is not None and mark in first_line), None)
