"""How rows without splits are divided, and how a division knows its rows again."""

import itertools
from collections import Counter

import pytest

from sparse_ft.errors import DataError
from sparse_ft.tasks.dividing import cut_validation, divide_rows
from sparse_ft.tasks.records import Record
from sparse_ft.tasks.spec import Division, TaskSpec

SIX = dict.fromkeys("abcdef", 10)
RANDOM = Division(rule="random")
VALIDATION_BEFORE, TEST_BEFORE = [1, 10, 29], [3, 18, 19]
"""Of 30 rows with different texts, as version 0.1 held them out."""


def records_of(sizes, *, alike=1):
    """Give rows of each class in turn; ``alike`` rows of a class have the same text."""
    rows = [(f"{label} {number // alike}", label) for label, size in sizes.items() for number in range(size)]
    rows.sort(key=lambda row: row[0][::-1])
    return [Record({"text": text, "label": label}, "rows", number) for number, (text, label) in enumerate(rows, 1)]


def spec_of(kind="classification", **division):
    return TaskSpec(name="toy", kind=kind, metric="accuracy", division=Division(**division) if division else None)


def divide(records, spec=None, before=None):
    return divide_rows(spec or spec_of(), records, columns={"text": "text", "label": "label"}, before=before)


def classes(parts):
    return [dict(Counter(record.values["label"] for record in part)) for part in parts.values()]


def test_each_class_is_in_each_part():
    parts, division = divide(records_of(SIX))
    assert classes(parts) == [dict.fromkeys("abcdef", size) for size in (8, 1, 1)]
    assert (division.rule, division.train, division.validation, division.test) == ("stratified", 48, 6, 6)
    assert divide(records_of(SIX))[0] == parts
    for part in parts.values():
        assert [record.number for record in part] == sorted(record.number for record in part)


@pytest.mark.parametrize(("sizes", "alike"), [
    ({"a": 20, "b": 15, "c": 10, "d": 8, "e": 5, "f": 2}, 1),
    ({"a": 30, "b": 30}, 3),
    ({"a": 100, "b": 3}, 1),
    (dict.fromkeys("abcdefghijklmnop", 3), 1),
    ({"a": 2, "b": 1, "c": 1}, 1),
    ({"a": 3}, 1),
    ({"a": 41}, 7),
])  # fmt: skip
def test_parts_have_their_share_and_every_class_is_trained(sizes, alike):
    records = records_of(sizes, alike=alike)
    parts, _ = divide(records)
    assert sorted(record.number for part in parts.values() for record in part) == list(range(1, len(records) + 1))
    assert all(parts.values())
    train, *held = classes(parts)
    for part in held:
        assert sum(part.values()) <= max(1, -(-len(records) // 10), alike)
        for label, size in sizes.items():
            assert abs(part.get(label, 0) - size / 10) < max(1, alike)
    assert {label for label, size in sizes.items() if size > 2} <= set(train)
    texts = [{record.values["text"] for record in part} for part in parts.values()]
    assert not any(one & other for one, other in itertools.combinations(texts, 2))


def test_a_row_with_several_labels_counts_for_its_rarest():
    rows = [["common", "rare"] if number % 3 == 0 else ["common"] for number in range(60)]
    records = [Record({"text": f"t{number}", "labels": labels}, "rows", number) for number, labels in enumerate(rows)]
    parts, _ = divide_rows(spec_of("multi_label"), records, columns={"text": "text", "labels": "labels"})
    rare = [sum("rare" in record.values["labels"] for record in part) for part in parts.values()]
    assert rare == [16, 2, 2]
    joined = [
        record._replace(values={**record.values, "labels": "|".join(record.values["labels"])}) for record in records
    ]
    again, _ = divide_rows(spec_of("multi_label"), joined, columns={"text": "text", "labels": "labels"})
    assert [[record.number for record in part] for part in again.values()] == [
        [record.number for record in part] for part in parts.values()
    ]


def test_the_rule_before_holds_out_the_rows_that_it_always_did():
    records = [Record({"text": f"t{number}", "label": "ab"[number % 2]}, "rows", number) for number in range(30)]
    parts, division = divide(records, spec_of(rule="random"))
    assert {split: [record.number for record in part] for split, part in parts.items() if split != "train"} == {
        "validation": VALIDATION_BEFORE,
        "test": TEST_BEFORE,
    }
    assert division.rule == "random"
    tagged = [record._replace(values={"tokens": [f"t{record.number}"]}) for record in records]
    same, division = divide_rows(spec_of("token_classification"), tagged, columns={"tokens": "tokens", "tags": "tags"})
    assert [record.number for record in same["test"]] == TEST_BEFORE  # rows without classes
    assert division.rule == "random"


def test_folds_test_every_row_once_and_never_train_on_it():
    records = records_of({"a": 13, "b": 9, "c": 3}, alike=2)
    tested = []
    for number in range(1, 6):
        parts, division = divide(records, spec_of(rule="stratified", fold=(number, 5)))
        assert division.fold == (number, 5)
        texts = {split: {record.values["text"] for record in part} for split, part in parts.items()}
        assert all(parts.values())
        assert not texts["test"] & (texts["train"] | texts["validation"])
        assert not texts["train"] & texts["validation"]
        assert {"a", "b"} <= set(classes(parts)[2])
        tested += [record.number for record in parts["test"]]
    assert sorted(tested) == list(range(1, 26))
    with pytest.raises(DataError, match=r"'rows' has 3 rows, too few .* Expected at least 5"):
        divide(records_of({"a": 3}), spec_of(rule="stratified", fold=(1, 5)))


def test_all_trains_on_every_row():
    records = records_of(SIX)
    parts, division = divide(records, spec_of(rule="all"))
    assert parts == {"train": records}
    assert (division.train, division.validation, division.test) == (60, 0, 0)
    splits = {"train": records}
    cut_validation(spec_of(rule="all"), splits, columns={"text": "text", "label": "label"})
    assert splits == {"train": records}


def test_validation_is_cut_by_class():
    splits = {"train": records_of(SIX), "test": []}
    division = cut_validation(spec_of(), splits, columns={"text": "text", "label": "label"})
    assert Counter(record.values["label"] for record in splits["validation"]) == dict.fromkeys("abcdef", 1)
    assert (division.train, division.validation, division.test) == (54, 6, 0)


def test_a_task_that_is_trained_further_keeps_the_division_of_the_same_rows():
    records = records_of(SIX)
    old_parts, old = divide(records, spec_of(rule="random"))
    assert divide(records, spec_of(rule="stratified"), before=old)[0] == old_parts
    assert divide(records, spec_of(rule="stratified"), before=RANDOM)[0] == old_parts  # a checkpoint without a digest
    relabelled = [records[0]._replace(values={**records[0].values, "label": "b"}), *records[1:]]
    for others in (records[1:], relabelled):
        assert divide(others, spec_of(rule="stratified"), before=old)[1].rule == "stratified"
    assert divide(records, spec_of(rule="stratified"), before=Division(rule="own"))[1].rule == "stratified"
