"""Read the file formats of the CLUE benchmark."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_ft.backbone.words import BLANK
from sparse_ft.errors import DataError
from sparse_ft.tasks.formats import FileOptions, _parse_json, _read_jsonl
from sparse_ft.tasks.records import QUESTION, Record, pick, read_text


def _read_cluener(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``text`` and ``spans`` of CLUENER's lines, whose offsets are inclusive at both ends."""
    for record in _read_jsonl(path, options):
        if "spans" in record.values:
            yield record
            continue
        text, types = pick(record, "text"), record.values.get("label") if isinstance(record.values, dict) else None
        spans: list[dict[str, Any]] = []
        try:
            for entity_type, surfaces in (types or {}).items():
                for surface, places in surfaces.items():
                    for start, end in places:
                        _check_surface(record, text, start, surface)
                        spans.append({"start": start, "end": end + 1, "type": entity_type})
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f'{record.place}: the label is not {{"type": {{"words": [[first, last], …]}}, …}}: {error}.'
            ) from error
        yield record._replace(values={"text": text, "spans": None if types is None else spans})


def _read_cluewsc(path: Path, options: FileOptions) -> Iterator[Record]:
    for record in _read_jsonl(path, options):
        yield mark_pronoun(record)


def mark_pronoun(record: Record) -> Record:
    """Mark the candidate ``_so_`` and the pronoun ``[so]`` in the text of a CLUEWSC record.

    The marks are those of CLUE's own baseline:
    https://github.com/CLUEbenchmark/CLUE/blob/master/baselines/models_pytorch/classifier_pytorch/processors/clue.py

    Raises:
        DataError: If a span does not stand where its index says.
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
            f"{record.place}: the target needs span1_index, span1_text, span2_index and span2_text: {error!r}."
        ) from error
    for position, mark in sorted(marks, key=lambda entry: entry[0], reverse=True):
        text = text[:position] + mark + text[position:]
    return record._replace(values={**record.values, "text": text})  # type: ignore[dict-item]


def _check_surface(record: Record, text: str, start: int, surface: str) -> None:
    found = text[start : start + len(surface)]
    if found != surface:
        raise DataError(
            f"{record.place}: {surface!r} should stand at character {start}, but {found!r} does. Correct the offset."
        )


def _read_c3(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``context``, ``question``, ``choice`` and ``answer`` of each question of C3, its documents as lines.

    The file is a list of ``[[document, …], [{question, choice, answer}, …], id]``, as read by
    https://github.com/CLUEbenchmark/CLUE/blob/9d232934e74c3ddd1f7b25d8e9711900aef5b8fe/baselines/models_pytorch/mrc_pytorch/run_c3.py
    """
    content = _parse_json(read_text(path), repr(str(path)))
    number = 0
    for place, entry in enumerate(content if isinstance(content, list) else [content], start=1):
        parts = entry if isinstance(entry, list) else []
        if len(parts) < 2 or not all(isinstance(part, list) for part in parts[:2]):
            raise DataError(
                f"{str(path)!r}, entry {place}: expected [[document, …], [question, …], id] as C3 has it, found "
                f"{str(entry)[:60]!r}. Check that it is the right file."
            )
        for question in parts[1]:
            number += 1
            yield Record({**question, "context": "\n".join(map(str, parts[0]))}, str(path), number, QUESTION)


def _read_chid(path: Path, options: FileOptions) -> Iterator[Record]:
    """Yield ``text``, ``candidates``, ``answer`` and ``id`` of each blank of ChID's passages.

    A line is ``{"content": [passage, …], "candidates": [idiom, …]}``, with blanks written ``#idiom000378#``; the place
    of the right candidate stands under that name in the file ``<name>_answer.json`` beside it, as read by
    https://github.com/CLUEbenchmark/CLUE/blob/9d232934e74c3ddd1f7b25d8e9711900aef5b8fe/baselines/models_pytorch/mrc_pytorch/preprocess/CHID_preprocess.py
    In ``text`` the blank that is asked for is BLANK, and the others are dots.
    """
    answers = _chid_answers(path)
    number = 0
    for record in _read_jsonl(path, options):
        candidates = pick(record, "candidates")
        for passage in pick(record, "content"):
            for name in _IDIOM.findall(passage):
                number += 1
                text = _IDIOM.sub("……", passage.replace(name, BLANK))
                answer = None if answers is None else answers.get(name)
                if answers is not None and answer is None:
                    raise DataError(
                        f"{record.place}: the answers beside the file have none for {name}. Fetch both anew."
                    )
                values = {"text": text, "candidates": candidates, "answer": answer, "id": name}
                yield Record(values, str(path), number, "blank")


_IDIOM = re.compile(r"#idiom\d+#")


def _chid_answers(path: Path) -> dict[str, int] | None:
    """Read the answers that belong to a file of passages; None if its publisher hides them."""
    name = f"{path.name.removesuffix('.gz').removesuffix('.json')}_answer.json"
    beside = next((other for other in (path.with_name(name), path.with_name(f"{name}.gz")) if other.is_file()), None)
    return None if beside is None else dict(_parse_json(read_text(beside), repr(str(beside))))
