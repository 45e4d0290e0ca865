"""Character spans: their words, and offsets that seem to be wrong."""

import json
import logging
import re

import pytest

from sparse_ft.errors import DataError
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.spec import TaskSpec


def written(folder, *texts, language="en", start=0, end=0) -> TaskSpec:
    """Write rows whose only place is in brackets, and return the task; ``start`` and ``end`` shift the offsets."""
    rows = []
    for text in texts:
        left, right = text.index("["), text.index("]") - 1
        spans = [{"start": left + start, "end": right + end, "type": "LOC"}]
        rows.append(json.dumps({"text": text.replace("[", "").replace("]", ""), "spans": spans}))
    content = "\n".join(rows)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(content, encoding="utf-8")
    files = {"format": "jsonl", **{split: f"{split}.jsonl" for split in ("train", "validation", "test")}}
    columns = {"text": "text", "spans": "spans"}
    return TaskSpec(
        name="places", kind="token_classification", language=language, files=files, columns=columns, metric="f1"
    )


@pytest.mark.parametrize(("language", "text"), [
    ("fr", "Omar critique l'[Argentine] le 3 mai."),
    ("it", "Il presidente dell’[Italia]."),
    ("tr", "Jonas [Ankara]'da yaşıyor."),
    ("en", "She left [Gothenburg].Then he came."),
    ("en", "\ufeff[Gothen\x02burg]\u200f is near."),
])  # fmt: skip
def test_names_are_words_where_a_model_is_scored(tmp_path, caplog, language, text):
    test = read(written(tmp_path, text, language=language), data=tmp_path)["test"].to_dict()
    assert test["parents"] == [list(range(len(test["tokens"][0])))]
    assert test["tags"][0].count("B-LOC") == len(test["tags"][0]) - test["tags"][0].count("O") == 1
    assert "within a word" not in caplog.text


@pytest.mark.parametrize(("shift", "problem"), [
    ({"end": -1}, "12 of 12 spans end within a word; are the ends inclusive?"),
    ({"start": 1}, "12 of 12 spans begin within a word; do they count from 1?"),
    ({"start": 1, "end": 1}, "12 of 12 spans begin within a word; do they count from 1?"),
])  # fmt: skip
def test_offsets_that_count_in_another_way_are_refused(tmp_path, shift, problem):
    texts = [f"Omar loves [{place}] on May 3." for place in ["England", "Spain", "Peru"] * 4]
    with pytest.raises(DataError, match=f"train.jsonl': {re.escape(problem)} Offsets count characters from 0"):
        read(written(tmp_path, *texts, **shift), data=tmp_path)
    read(written(tmp_path, *texts), data=tmp_path)


def test_training_spans_that_no_answer_equals_are_told(tmp_path, caplog):
    texts = ["A [Berlin]-based firm", "In [Bremen]s Norden", "in [New\nYork]", "in [Rome]"]
    spec = written(tmp_path, *texts)
    with caplog.at_level(logging.WARNING, logger="sparse_ft"):
        read(spec, data=tmp_path, splits=["test"])
        assert caplog.text == ""
        read(spec, data=tmp_path)
    assert "2 of 4 spans begin or end within a word" in caplog.text
    assert "1 of 4 spans go over a line break" in caplog.text
