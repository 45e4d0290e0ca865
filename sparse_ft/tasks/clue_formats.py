"""Read the file formats of the CLUE benchmark."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_ft.backbone.words import BLANK
from sparse_ft.errors import DataError
from sparse_ft.tasks.json_formats import load_json, read_jsonl
from sparse_ft.tasks.records import QUESTION, FileOptions, Record, pick
from sparse_ft.tasks.values import exact_text


def read_cluener(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``text`` and ``spans`` of CLUENER's lines, whose offsets are inclusive at both ends."""
    for record in read_jsonl(path, options):
        if "spans" in record.values:
            yield record
            continue
        text, types = pick(record, "text"), record.values.get("label") if isinstance(record.values, dict) else None
        spans: list[dict[str, Any]] = []
        try:
            for entity_type, surfaces in (types or {}).items():
                for surface, offsets in surfaces.items():
                    for start, end in offsets:
                        _check_surface(record, text, start, surface)
                        spans.append({"start": start, "end": end + 1, "type": entity_type})
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f'{record.location}: the label is not {{"type": {{"words": [[first, last], …]}}, …}}: {error}.'
            ) from error
        yield record._replace(values={"text": text, "spans": None if types is None else spans})


def read_cluewsc(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield CLUEWSC's records with the candidate and the pronoun marked in ``text``."""
    for record in read_jsonl(path, options):
        yield mark_pronoun(record)


def mark_pronoun(record: Record) -> Record:
    """Mark the candidate of a CLUEWSC record with underscores and the pronoun with brackets: ``_Ada_ said [she]``.

    CLUE's baseline uses the same marks:
    https://github.com/CLUEbenchmark/CLUE/blob/master/baselines/models_pytorch/classifier_pytorch/processors/clue.py

    Raises:
        DataError: If the text does not hold a span at its index.
    """
    text, target = pick(record, "text"), pick(record, "target")
    marks = []
    try:
        for name, left, right in (("span1", "_", "_"), ("span2", "[", "]")):
            start, surface = target[f"{name}_index"], target[f"{name}_text"]
            _check_surface(record, text, start, surface)
            marks += [(start + len(surface), right), (start, left)]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{record.location}: the target needs span1_index, span1_text, span2_index and span2_text: {error!r}."
        ) from error
    for position, mark in sorted(marks, key=lambda entry: entry[0], reverse=True):
        text = text[:position] + mark + text[position:]
    return record._replace(values={**record.values, "text": text})  # type: ignore[dict-item]


def _check_surface(record: Record, text: str, start: int, surface: str) -> None:
    there = text[start : start + len(surface)]
    if there != surface:
        raise DataError(
            f"{record.location}: {surface!r} should stand at character {start}, but {there!r} does. Correct the offset."
        )


def read_c3(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``context``, ``question``, ``choice`` and ``answer`` of each question of C3, its documents as lines.

    The file is a list of ``[[document, …], [{question, choice, answer}, …], id]``, as read by
    https://github.com/CLUEbenchmark/CLUE/blob/9d232934e74c3ddd1f7b25d8e9711900aef5b8fe/baselines/models_pytorch/mrc_pytorch/run_c3.py
    """
    content = load_json(path)
    number = 0
    for entry_number, entry in enumerate(content if isinstance(content, list) else [content], start=1):
        parts = entry if isinstance(entry, list) else []
        if len(parts) < 2 or not all(isinstance(part, list) for part in parts[:2]):
            raise DataError(
                f"{str(path)!r}, entry {entry_number}: expected [[document, …], [question, …], id] as C3 has it, found "
                f"{str(entry)[:60]!r}. Check that it is the right file."
            )
        for question in parts[1]:
            number += 1
            record = Record(question, str(path), number, QUESTION)
            context = "\n".join(exact_text(part, "a document", record.location) for part in parts[0])
            yield record._replace(values={**question, "context": context})


def read_chid(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``text``, ``candidates``, ``answer`` and ``id`` of each blank of ChID's passages.

    A line is ``{"content": [passage, …], "candidates": [idiom, …]}``, with blanks written ``#idiom000378#``. The file
    ``<name>_answer.json`` beside it maps each blank to the index of the right candidate, as read by
    https://github.com/CLUEbenchmark/CLUE/blob/9d232934e74c3ddd1f7b25d8e9711900aef5b8fe/baselines/models_pytorch/mrc_pytorch/preprocess/CHID_preprocess.py
    In ``text`` the blank of the record is BLANK, and the other blanks are dots.
    """
    answers = _chid_answers(path)
    number = 0
    for record in read_jsonl(path, options):
        candidates = pick(record, "candidates")
        for passage in pick(record, "content"):
            for name in _IDIOM.findall(passage):
                number += 1
                text = _IDIOM.sub("……", passage.replace(name, BLANK))
                answer = None if answers is None else answers.get(name)
                if answers is not None and answer is None:
                    raise DataError(
                        f"{record.location}: the answers beside the file have none for {name}. Fetch both files again."
                    )
                values = {"text": text, "candidates": candidates, "answer": answer, "id": name}
                yield Record(values, str(path), number, "blank")


_IDIOM = re.compile(r"#idiom\d+#")


def _chid_answers(path: Path) -> dict[str, int] | None:
    """Read the answers that belong to a file of passages; None if their publisher hides them."""
    name = f"{path.name.removesuffix('.gz').removesuffix('.json')}_answer.json"
    beside = next((other for other in (path.with_name(name), path.with_name(f"{name}.gz")) if other.is_file()), None)
    return None if beside is None else dict(load_json(beside))
