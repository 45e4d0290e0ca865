"""Load data sets of the hub, or of a folder in hub layout; text files as they stand, without guesses at types."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

from sparse_ft.errors import DataError
from sparse_ft.tasks.formats import read_file
from sparse_ft.tasks.json_formats import holds_lines
from sparse_ft.tasks.records import FileOptions, Record, read_text
from sparse_ft.tasks.spec import Column, HubSource
from sparse_ft.tasks.table_formats import named_records

_TEXT_FILE = re.compile(r"\.(csv|tsv|jsonl|json)(\.gz)?$")
_ON_HUB = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<file>.+)")


def load_hub(hub: HubSource, columns: dict[str, Column]) -> Mapping[str, Iterator[Record]]:
    """Return the records of each split, by its name on the hub; they are read when they are iterated.

    CSV, TSV and JSON files whose columns have no declared types are read by the readers of this package. The
    ``datasets`` library would let pandas and Arrow guess, which turns ``01`` into 1 and ``NA`` into a missing value.

    Raises:
        DataError: If the data set cannot be found or loaded.
    """
    try:
        with tempfile.TemporaryDirectory() as empty:  # in the usual cache lie the types that were guessed before
            builder = datasets.load_dataset_builder(hub.path, hub.name, revision=hub.revision, cache_dir=empty)
        files = _text_files(builder)
        if files is None:
            loaded = datasets.load_dataset(hub.path, hub.name, revision=hub.revision)
            return {split: named_records(loaded[split], f"{hub.path} ({split})") for split in loaded}
    except Exception as error:  # the library raises a dozen types, from httpx, huggingface_hub, pyarrow and its own
        reason = " ".join(str(error).split()).rstrip(".")
        config = f" ({hub.name})" if hub.name else ""
        raise DataError(
            f"Data set {hub.path!r}{config} could not be loaded from the hub: {reason}. Check the network and the id, "
            "or download the files and name their folder with --data FOLDER."
        ) from error
    options = FileOptions(columns, key=getattr(builder.config, "field", None))
    return {split: _records(paths, options) for split, paths in files.items()}


def _text_files(builder: datasets.DatasetBuilder) -> dict[str, list[Path]] | None:
    """Return the files of each split on this machine; None unless all are tables or JSON without declared types."""
    config = builder.config
    names = {str(split): [str(name) for name in names] for split, names in (config.data_files or {}).items()}
    typed = builder.info.features is not None or getattr(config, "features", None) is not None
    every = [name for files in names.values() for name in files]
    separated = getattr(config, "sep", None) in {None, ",", "\t"}
    if typed or not every or not separated or not all(_TEXT_FILE.search(name) for name in every):
        return None
    if not all(Path(name).is_file() or _ON_HUB.fullmatch(name) for name in every):
        return None
    return {split: [_fetched(name) for name in files] for split, files in names.items()}


def _fetched(name: str) -> Path:
    match = _ON_HUB.fullmatch(name)
    if match is None:
        return Path(name)
    fetched = huggingface_hub.hf_hub_download(
        match["repo"], match["file"], repo_type="dataset", revision=match["revision"]
    )
    return Path(fetched)


def _records(paths: Sequence[Path], options: FileOptions) -> Iterator[Record]:
    count = 0
    for path in paths:
        records = read_file(path.parent, path.name, format=_format(path), options=options)
        yield from (record._replace(row=record.row + count) for record in records)
        count += len(records)


def _format(path: Path) -> str:
    match: Any = _TEXT_FILE.search(path.name)
    return str(match[1]) if match[1] != "json" else "jsonl" if holds_lines(read_text(path)) else "json"
