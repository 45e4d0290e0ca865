"""The file formats, by the name that task files use."""

from collections.abc import Callable, Iterator
from pathlib import Path

from sparse_ft.errors import DataError
from sparse_ft.tasks.clue_formats import read_c3, read_chid, read_cluener, read_cluewsc
from sparse_ft.tasks.json_formats import read_json, read_jsonl, read_squad
from sparse_ft.tasks.records import FileOptions, Record, locate
from sparse_ft.tasks.spec import Column
from sparse_ft.tasks.table_formats import read_conll, read_csv, read_lines, read_parquet, read_tsv

FORMATS: dict[str, Callable[[Path, FileOptions], Iterator[Record]]] = {
    "conll": read_conll,
    "csv": read_csv,
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "json": read_json,
    "cluener": read_cluener,
    "cluewsc": read_cluewsc,
    "squad": read_squad,
    "c3": read_c3,
    "chid": read_chid,
    "parquet": read_parquet,
    "lines": read_lines,
}


def read_file(folder: Path, name: str, *, format: str, options: FileOptions) -> list[Record]:
    """Read all records of one file, or of one folder of line-parallel files.

    Args:
        folder: Folder of the file.
        name: Name of the file, with or without ``.gz``; ``file.json#key`` selects one key of a JSON object.
        format: A key of FORMATS.
        options: Layout of the file.

    Returns:
        At least one record; ``row`` counts from 0.

    Raises:
        DataError: If the file is missing, empty or malformed; with file and line.
    """
    file_name, _, key = name.partition("#")
    path = folder / file_name if format == "lines" else locate(folder, file_name)
    records: list[Record] = []
    try:
        for row, record in enumerate(FORMATS[format](path, options._replace(key=key or None))):
            records.append(record._replace(row=row))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        where = f"{records[-1].location}: the rest of the file" if records else f"{str(path)!r}: its beginning"
        raise DataError(
            f"{where} does not have the shape of the format {format!r} ({error}). Correct the file."
        ) from error
    if not records:
        raise DataError(f"Data file {str(path)!r} has no rows. Expected at least one; check that it is the right file.")
    return records


def record_columns(format: str, columns: dict[str, Column]) -> dict[str, Column]:
    """Map the columns of a format's records: where the reader of a format has named them, our names."""
    renamed = {"conll": set(columns), "cluener": set(columns), "cluewsc": {"text"}}.get(format, set())
    return {name: name if name in renamed else column for name, column in columns.items()}
