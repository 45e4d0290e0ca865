"""Divide rows without splits into train, validation and test, or into folds."""

import hashlib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

from sparse_ft.errors import DataError
from sparse_ft.tasks.label_lists import LABEL_SEPARATOR
from sparse_ft.tasks.records import Record, pick, plain_text
from sparse_ft.tasks.spec import SPLITS, Column, Division, Split, TaskSpec
from sparse_ft.tasks.values import label_text, list_cell

_LOG = logging.getLogger("sparse_ft")

SPLIT_SEED = 13
"""Fixed, so that every run holds out the same rows."""
_TENTHS = 10


def divide_rows(
    spec: TaskSpec, records: Sequence[Record], *, columns: Mapping[str, Column], before: Division | None = None
) -> tuple[dict[Split, list[Record]], Division]:
    """Divide rows into train, validation and test by the division of a task.

    Args:
        spec: The task; without a division, its rows are stratified.
        records: All rows of the source.
        columns: Our column to the source's.
        before: The division in the checkpoint that is trained further; it stays as it is if it was of these rows.

    Returns:
        The rows of each part, in the order of the source, and the division with the facts of these rows.

    Raises:
        DataError: If there are too few different texts.
    """
    rows = _Rows(spec, records, columns)
    division = rows.division(before)
    parts = dict(zip(SPLITS, rows.divide(division), strict=False))
    return parts, rows.described(division, parts)


def cut_validation(
    spec: TaskSpec,
    records: dict[Split, list[Record]],
    *,
    columns: Mapping[str, Column],
    before: Division | None = None,
) -> Division:
    """Move a fixed tenth of train to validation; return the division. The other arguments are those of divide_rows."""
    if "train" not in records:
        return OWN
    rows = _Rows(spec, records["train"], columns)
    division = rows.division(before)
    parts = dict(zip(SPLITS, rows.cut(division), strict=False))
    records.update(parts)
    return rows.described(division, parts)


OWN = Division(rule="own")
"""The division of a source that has all its splits."""


def rows_digest(spec: TaskSpec, records: Sequence[Record], *, columns: Mapping[str, Column]) -> str:
    """Return the SHA-256 of the texts and labels of rows, by which a division knows its rows again."""
    return _Rows(spec, records, columns).digest


class _Rows:
    """The rows of a source without splits: their texts, which stay together, and their labels."""

    def __init__(self, spec: TaskSpec, records: Sequence[Record], columns: Mapping[str, Column]) -> None:
        self.records, self.wanted = records, spec.division or Division(rule="stratified")
        column = columns.get("text", columns.get("tokens"))  # of the text, or of its words
        self.texts = [_text_of(record, column) for record in records]
        self.labels = [_labels_of(record, columns) for record in records]

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for record, text, labels in zip(self.records, self.texts, self.labels, strict=True):
            digest.update(repr((repr(record.values) if text is None else text, labels)).encode("utf-8", "replace"))
        return digest.hexdigest()

    def division(self, before: Division | None) -> Division:
        """Return the division before if it was of these rows or knows no rows, else the wanted one."""
        if before is not None and before.rule != "own" and before.sha256 in ("", self.digest):
            return before
        random_draw = self.wanted.rule == "stratified" and self.wanted.fold is None and not any(self.labels)
        return Division(rule="random") if random_draw else self.wanted

    def described(self, division: Division, parts: Mapping[Split, Sequence[Record]]) -> Division:
        """Return a division with the number of rows of each part, and the digest of all rows."""
        sizes = {f"{split}": len(part) for split, part in parts.items()}
        return division.model_copy(update={"sha256": self.digest, **dict.fromkeys(SPLITS, 0), **sizes})

    def divide(self, division: Division) -> list[list[Record]]:
        """Return the rows of train, validation and test; all in train if the division holds none out."""
        if division.rule == "all":
            return [list(self.records)]
        if division.rule == "random":
            return self._select(*self._drawn((8, 1, 1)))
        if division.fold is None:
            return self._select(*self._dealt(self._groups(least=3), held=2))
        number, folds = division.fold
        dealt = _deal(self._groups(least=folds), classes=self.labels, folds=folds)
        rest = list(itertools.chain(*(groups for index, groups in enumerate(dealt, start=1) if index != number)))
        train, validation = self._dealt(rest, held=1)
        return self._select(train, validation, list(itertools.chain(*dealt[number - 1])))

    def cut(self, division: Division) -> list[list[Record]]:
        """Return the rows of train and validation; all in train if the division holds none out."""
        if division.rule == "all":
            return [list(self.records)]
        if division.rule == "random":
            return self._select(*self._drawn((9, 1)))
        return self._select(*self._dealt(self._groups(least=2), held=1))

    def _select(self, *parts: Sequence[int]) -> list[list[Record]]:
        return [[self.records[row] for row in sorted(part)] for part in parts]

    def _groups(self, *, least: int) -> list[list[int]]:
        """Return the rows of each text, so that no part is scored on a text that another was trained on.

        The exception: if the rarest text has a fifth of all rows, it may be a class of its own, and rows stand alone.

        Raises:
            DataError: If there are fewer groups than ``least``.
        """
        by_text: dict[str, list[int]] = {}
        for row, text in enumerate(self.texts):
            by_text.setdefault(text or f"row {row}", []).append(row)
        groups, number, path = list(by_text.values()), len(self.records), self.records[0].path
        if len(groups) < least:
            noun = "rows" if len(groups) == number else "rows with different texts"
            raise DataError(
                f"{path!r} has {len(groups)} {noun}, too few to hold some out for validation and test. "
                f"Expected at least {least}."
            )
        if len(min(groups, key=len)) * 5 >= number > len(groups):
            _LOG.warning(
                "%s has only %d different texts in %d rows, so rows with the same text stand in several of its parts.",
                path, len(groups), number,
            )  # fmt: skip
            return [[row] for row in range(number)]
        return groups

    def _dealt(self, groups: Sequence[list[int]], *, held: int) -> list[list[int]]:
        """Divide groups into ten folds by their classes; the last ``held`` folds are parts, the others are train."""
        folds = _deal(groups, classes=self.labels, folds=min(_TENTHS, len(groups)), held=held)
        if not all(folds[-held:]):  # each class has one group, or too much of one text
            folds = _deal(groups, classes=[()] * len(self.records), folds=len(folds), held=held)
        for fold in folds[len(folds) - held :]:
            if not fold:
                largest = max(folds[:-held], key=len)
                fold.append(largest.pop(largest.index(min(largest, key=len))))
        train, *parts = list(itertools.chain(*folds[:-held])), *folds[-held:]
        return [list(itertools.chain(*part)) for part in (train, *parts)]

    def _drawn(self, tenths: Sequence[int]) -> list[list[int]]:
        """Draw the parts without regard to classes, as versions before 0.2 did; the first part takes the remainder."""
        groups = self._groups(least=len(tenths))
        random.Random(SPLIT_SEED).shuffle(groups)
        parts: list[list[int]] = []
        for share in reversed(tenths[1:]):
            chosen = set(itertools.chain(*_fill(groups, room=max(1, len(self.records) * share // 10))))
            groups = [group for group in groups if group[0] not in chosen]
            parts.append(list(chosen))
        return [list(itertools.chain(*groups)), *reversed(parts)]


def _deal(
    groups: Sequence[list[int]], *, classes: Sequence[Sequence[str]], folds: int, held: int = 0
) -> list[list[list[int]]]:
    """Deal groups of rows to folds, so that the folds have as many rows of each class and as many in all.

    A row with several labels counts for its rarest one, as in Sechidis et al. 2011,
    https://doi.org/10.1007/978-3-642-23808-6_10. Classes come rarest first, their groups in a random order that is
    fixed. The first group of a class, and groups larger than a fold, avoid the last ``held`` folds.
    """
    number = Counter(itertools.chain(*(classes[row] for group in groups for row in group)))
    by_class: dict[str, list[list[int]]] = {}
    for group in groups:
        labels = {label for row in group for label in classes[row]}
        by_class.setdefault(min(labels, key=lambda label: (number[label], label), default=""), []).append(group)
    dealt: list[list[list[int]]] = [[] for _ in range(folds)]
    sizes, room = [0] * folds, max(1, sum(map(len, groups)) // folds)
    for name in sorted(by_class, key=lambda name: (len(by_class[name]), name)):
        of_class = [0] * folds
        random.Random(f"{SPLIT_SEED}/{name}").shuffle(by_class[name])
        for index, group in enumerate(sorted(by_class[name], key=lambda group: -max(room, len(group)))):
            last = folds - held if index == 0 or len(group) > room else folds
            best = min(range(last), key=lambda fold: (of_class[fold], sizes[fold]))
            dealt[best].append(group)
            of_class[best] += len(group)
            sizes[best] += len(group)
    return dealt


def _fill(groups: Sequence[list[int]], *, room: int) -> list[list[int]]:
    """Take groups in their order while they fit into ``room`` rows; the smallest group if none fits."""
    taken: list[list[int]] = []
    for group in groups:
        if len(group) <= room:
            taken.append(group)
            room -= len(group)
    return taken or [min(groups, key=len)]


def _text_of(record: Record, column: Column | None) -> str | None:
    """Return the text of a record without case and white space; None if it has none."""
    value = _value(record, column)
    return "".join(plain_text(value).lower().split()) if value is not None else None


def _labels_of(record: Record, columns: Mapping[str, Column]) -> tuple[str, ...]:
    """Return the labels of a record as its source writes them; none where rows have no classes."""
    value = _value(record, columns.get("label", columns.get("labels")))
    if "labels" in columns and isinstance(value, str):
        value = list_cell(value) or [part.strip() for part in value.split(LABEL_SEPARATOR)]
    return tuple(label_text(item) for item in (value if isinstance(value, list) else [value]) if item not in (None, ""))


def _value(record: Record, column: Column | None) -> object:
    try:
        return None if column is None else pick(record, column)
    except DataError:
        return None
