"""Read the data of a task, from files or from the hub, into Datasets with the same columns whatever the source.

Columns: ``text``, ``text_pair`` and ``label`` (classification), ``labels`` (multi-label), ``tokens`` and ``tags``
(token classification, IOB2; with ``text``, ``starts`` and ``ends`` where the source marks character spans, and but for
train ``parents``, the word of the plain text that each token is a piece of),
``choices`` and ``answer``, the place of the right one (multiple choice), ``answers`` and ``answer_starts`` with the
``tokens``, ``starts`` and ``ends`` of the text (span extraction, whose question is ``text_pair``), and ``row``. Labels
are names; labels and answers are None where the publisher hides them. ``row`` is the 0-based row of the source, in file
order and before any row is left out; where a split is several files, the count runs on from one to the next.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets

from sparse_ft.errors import DataError
from sparse_ft.tasks.clue_formats import _read_c3, _read_chid, _read_cluener, _read_cluewsc, mark_pronoun
from sparse_ft.tasks.columns import Reading, fitting_columns, text_column, to_dataset, wanted_columns
from sparse_ft.tasks.dividing import cut_validation, divide_rows
from sparse_ft.tasks.formats import (
    FileOptions,
    _read_conll,
    _read_csv,
    _read_json,
    _read_jsonl,
    _read_lines,
    _read_parquet,
    _read_squad,
    _read_tsv,
    named_records,
)
from sparse_ft.tasks.in_memory import InMemory, TaskData, to_splits
from sparse_ft.tasks.records import Record, locate, read_text
from sparse_ft.tasks.schemes import split_tag
from sparse_ft.tasks.spec import SPLITS, Column, FileSource, HubSource, Split, TaskSpec

logger = logging.getLogger("sparse_ft")


# What a file of this suffix may hold. The task's own format is taken if it is there, else the first that fits its kind.
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


def read(
    spec: TaskSpec, *, data: TaskData | None = None, splits: Sequence[Split] = SPLITS
) -> dict[Split, datasets.Dataset]:
    """Read splits of a task.

    Args:
        spec: The task.
        data: A folder with the files that the task names; one file, which is divided 80/10/10 by a fixed seed; data in
            memory (see ``in_memory.to_splits``); or None for the bundled files, else the hub.
        splits: Which splits to return.

    Returns:
        The splits that the source has. A missing validation split is a fixed tenth of train, taken out of train.

    Raises:
        DataError: If a file is missing or malformed, with its path and line; if the hub cannot be reached; or if there
            is no source at all.
    """
    if data is not None and not isinstance(data, str | Path):
        return _read_memory(spec, data, splits)
    if data is not None and not Path(data).expanduser().is_dir():
        return _read_single(spec, Path(data).expanduser(), splits)
    root = _root(spec, data)
    if root is not None and spec.files is not None:
        return _read_folder(spec, spec.files, root, splits)
    return _read_hub(spec, str(root) if root else None, splits)


def label_names(spec: TaskSpec, train: datasets.Dataset) -> list[str]:
    """List the labels that a head for this task decides between.

    Args:
        spec: The task.
        train: Its train split, as ``read`` gives it.

    Returns:
        The task's own labels in their order, else those found in train, sorted; entity types (not tags) for token
        classification; none for kinds whose answers are each row's own.

    Raises:
        DataError: If train holds fewer than two classes, or no entity.
    """
    if not spec.has_labels:
        return []
    found = sorted(_found_labels(spec, train))
    if spec.kind == "classification" and len(found) < 2:
        raise DataError(
            f"Train of task {spec.name!r} has one class only: {found}. A classifier needs rows of at least two; "
            "check the label column and the order of the file."
        )
    if not found:
        raise DataError(f"Train of task {spec.name!r} has no label at all. Check the column and the label_scheme.")
    return spec.label_names or found


def _found_labels(spec: TaskSpec, dataset: datasets.Dataset) -> set[str]:
    if spec.kind == "classification":
        return {label for label in dataset["label"] if label is not None}
    if spec.kind == "multi_label":
        return {label for labels in dataset["labels"] for label in labels or []}
    return {split_tag(tag)[1] for tags in dataset["tags"] for tag in tags or [] if tag != "O"}


def rows_seen_in_train(spec: TaskSpec, split: Split, *, data: TaskData | None = None) -> set[int]:
    """Name the rows of an evaluation split whose text also occurs in train, as the task file lists them.

    Args:
        spec: The task.
        split: An evaluation split.
        data: As for ``read``. The list is made from the published files: for a single file, for data in memory and for
            the hub, whose order may differ, nothing is known.

    Returns:
        Values of the column ``row``.
    """
    if data is not None and not isinstance(data, str | Path):
        return set()
    from_folder = data is not None and Path(data).expanduser().is_dir()
    if from_folder or (data is None and spec.files is not None and spec.files.root is not None):
        return set(spec.leaks.get(split, []))
    return set()


def _root(spec: TaskSpec, data: str | Path | None) -> Path | None:
    """Find the folder to read from; None stands for the hub."""
    if data is not None:
        return Path(data).expanduser()
    root = Path(spec.files.root) if spec.files is not None and spec.files.root is not None else None
    if root is not None and (root.is_dir() or spec.hub is None):
        return root
    if spec.hub is None:
        raise DataError(
            f"Task {spec.name!r} comes without data. Name the folder that holds its files, or one file, with --data."
        )
    return None


def _read_folder(
    spec: TaskSpec, files: FileSource, root: Path, splits: Sequence[Split]
) -> dict[Split, datasets.Dataset]:
    columns = wanted_columns(spec, spec.columns)
    options = FileOptions(columns, separator=files.separator, header=files.header)
    named = {split: getattr(files, split) for split in SPLITS}
    records: dict[Split, list[Record]] = {}
    for split in _needed(splits, has_validation=named["validation"] is not None):
        rows: list[Record] = []
        hidden = split in files.unlabelled and files.format in {"conll", "lines"}
        rest = options._replace(columns=_without_labels(columns)) if hidden else options
        for name in [named[split]] if isinstance(named[split], str) else named[split] or []:
            found = read_file(root, name, format=files.format, options=rest)
            rows += [record._replace(row=record.row + len(rows)) for record in found]
        if rows:
            records[split] = rows
    columns = _record_columns(files.format, columns)
    if named["validation"] is None:
        cut_validation(spec, records, column=text_column(columns))
    reading = Reading(spec, columns, _source_labels(spec), spec.label_scheme)
    return _datasets(records, reading, splits=splits, unlabelled=files.unlabelled)


def _without_labels(columns: dict[str, Column]) -> dict[str, Column]:
    return {name: column for name, column in columns.items() if name not in {"label", "labels", "tags"}}


def _record_columns(format: str, columns: dict[str, Column]) -> dict[str, Column]:
    """Name the columns of records: where a reader has picked or written ours already, they bear our names."""
    renamed = {"conll": set(columns), "cluener": set(columns), "cluewsc": {"text"}}.get(format, set())
    return {name: name if name in renamed else column for name, column in columns.items()}


def _source_labels(spec: TaskSpec) -> dict[str, str]:
    """Map source values to names; not for tagging, where the task's labels are entity types inside tags."""
    return spec.labels if isinstance(spec.labels, dict) and spec.kind != "token_classification" else {}


def _needed(splits: Sequence[Split], *, has_validation: bool) -> list[Split]:
    """Add train where validation must be cut from it."""
    return [
        split
        for split in SPLITS
        if split in splits or (split == "train" and "validation" in splits and not has_validation)
    ]


def _datasets(
    records: dict[Split, list[Record]], reading: Reading, *, splits: Sequence[Split], unlabelled: Sequence[Split] = ()
) -> dict[Split, datasets.Dataset]:
    """Turn the records of the wanted splits into Datasets; only train must have known labels throughout."""
    return {
        split: to_dataset(records[split], reading._replace(strict=split == "train", labelled=split not in unlabelled))
        for split in SPLITS
        if split in splits and split in records
    }


def _read_single(spec: TaskSpec, path: Path, splits: Sequence[Split]) -> dict[Split, datasets.Dataset]:
    """Read one file and divide it 80/10/10; its columns may bear the source's names or ours."""
    columns = wanted_columns(spec, spec.columns)
    file = locate(path.parent, path.name.partition("#")[0])
    format = _single_format(spec, file)
    if format == "conll":
        positions = {"tokens": 0, "tags": -1} if spec.kind == "token_classification" else {}
        columns = {
            name: column if isinstance(column, int) else positions.get(name, column) for name, column in columns.items()
        }
    separator = _separator(spec, file) if format == "conll" else None
    header = (spec.files is not None and spec.files.header) or None  # another file may have one where the task's do not
    found = read_file(
        path.parent, path.name, format=format, options=FileOptions(columns, separator=separator, header=header)
    )
    fitting = fitting_columns(_record_columns(format, columns), found[0])
    parts = divide_rows(found, column=text_column(fitting))
    return _datasets(parts, Reading(spec, fitting, _source_labels(spec), spec.label_scheme), splits=splits)


def _read_memory(spec: TaskSpec, data: InMemory, splits: Sequence[Split]) -> dict[Split, datasets.Dataset]:
    records = to_splits(spec, data)
    columns = fitting_columns(wanted_columns(spec, spec.columns), next(iter(records.values()))[0])
    return _datasets(records, Reading(spec, columns, _source_labels(spec), spec.label_scheme), splits=splits)


def _single_format(spec: TaskSpec, file: Path) -> str:
    """Tell the format of a file by its suffix and by the task, and where both leave it open by its first line."""
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    own = spec.files.format if spec.files is not None else None
    known = SUFFIXES.get(suffix, ())
    if known == ("parquet",):
        return "parquet"
    first_line = read_text(file).partition("\n")[0] if known or own else ""
    if not known and (own in {None, "lines", "parquet"} or "\0" in first_line):
        raise DataError(
            f"The format of {str(file)!r} cannot be told by its suffix {suffix!r}. "
            f"Expected one of {', '.join(SUFFIXES)} (each also with .gz). "
            "Rename the file, or give a folder and name its format in the task file."
        )
    if not known:
        return str(own)
    if suffix == ".json" and own not in {"json", "squad", "c3"} and first_line.lstrip().startswith("["):
        return "json"
    tagging = spec.kind == "token_classification"
    if tagging and "conll" in known and not {"tokens", "text"} & set(first_line.strip().split("\t")):
        return "conll"
    return own if own in known and own != "conll" else known[0]


def _separator(spec: TaskSpec, file: Path) -> str | None:
    """Take the task's separator if the first line with columns has it, a tab if that has one, else any white space."""
    lines = (line for line in read_text(file).split("\n") if line.strip() and not line.startswith("-DOCSTART-"))
    first_line = next(lines, "")
    own = spec.files.separator if spec.files is not None else None
    return next((separator for separator in (own, "\t") if separator is not None and separator in first_line), None)


def _read_hub(spec: TaskSpec, folder: str | None, splits: Sequence[Split]) -> dict[Split, datasets.Dataset]:
    """Read from the hub, or from a local folder in hub layout."""
    hub = spec.hub or HubSource(path=str(folder))
    if folder is not None:
        hub = hub.model_copy(update={"path": folder, "name": None, "revision": None})
    loaded = _load_hub(hub)
    theirs = {split: hub.splits.get(split, split) for split in SPLITS}
    has_validation = theirs["validation"] in loaded
    columns = wanted_columns(spec, spec.columns if hub.columns is None else hub.columns)
    records: dict[Split, list[Record]] = {}
    for split in _needed(splits, has_validation=has_validation):
        if theirs[split] in loaded:
            found = named_records(loaded[theirs[split]], f"{hub.path} ({theirs[split]})")
            marked = spec.files is not None and spec.files.format == "cluewsc"
            records[split] = [mark_pronoun(record) if marked else record for record in found]
    if not records:
        raise DataError(
            f"Data set {hub.path!r} has the splits {', '.join(loaded)}, not {', '.join(splits)}. Set `hub.splits`."
        )
    if not has_validation:
        cut_validation(spec, records, column=text_column(columns))
    labels = _source_labels(spec) if hub.labels is None else hub.labels
    reading = Reading(spec, columns, labels, hub.label_scheme or spec.label_scheme)
    return _datasets(records, reading, splits=splits)


def _load_hub(hub: HubSource) -> datasets.DatasetDict:
    try:
        loaded = datasets.load_dataset(hub.path, hub.name, revision=hub.revision)
    except Exception as error:  # the library raises a dozen kinds, from httpx, huggingface_hub, pyarrow and its own
        reason = " ".join(str(error).split()).rstrip(".")
        config = f" ({hub.name})" if hub.name else ""
        raise DataError(
            f"Data set {hub.path!r}{config} could not be loaded from the hub: {reason}. Check the network and the id, "
            "or download the files and name their folder with --data FOLDER."
        ) from error
    return loaded


def read_file(folder: Path, name: str, *, format: str, options: FileOptions) -> list[Record]:
    """Read all records of one file, or of one folder of line-parallel files.

    Args:
        folder: Where the file lies.
        name: Its name, with or without ``.gz``; ``file.json#key`` takes one key of a JSON object.
        format: A key of FORMATS.
        options: Its layout.

    Returns:
        At least one record; ``row`` counts from 0.

    Raises:
        DataError: If the file is missing, empty or malformed; with file and line.
    """
    file_name, _, key = name.partition("#")
    path = folder / file_name if format == "lines" else locate(folder, file_name)
    read = FORMATS[format]
    records: list[Record] = []
    try:
        for row, record in enumerate(read(path, options._replace(key=key or None))):
            records.append(record._replace(row=row))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        where = f"{records[-1].place}: what follows" if records else f"{str(path)!r}: its beginning"
        raise DataError(f"{where} has not the shape of the format {format!r} ({error}). Correct the file.") from error
    if not records:
        raise DataError(f"Data file {str(path)!r} has no rows. Expected at least one; check that it is the right file.")
    return records


FORMATS: dict[str, Callable[[Path, FileOptions], Iterator[Record]]] = {
    "conll": _read_conll,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "cluener": _read_cluener,
    "cluewsc": _read_cluewsc,
    "squad": _read_squad,
    "c3": _read_c3,
    "chid": _read_chid,
    "parquet": _read_parquet,
    "lines": _read_lines,
}
