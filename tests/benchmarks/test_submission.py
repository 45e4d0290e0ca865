"""Files for the CLUE site: count, order of ids, and the site's own codes. Answers come from a stand-in for a model."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from submission import SUBMISSIONS, write_submission

from sparse_ft.errors import ConfigError, DataError
from sparse_ft.tasks.spec import load_task

ROOT = os.environ.get("SPARSE_FT_DATA_ROOT")
pytestmark = pytest.mark.benchmarks
real = pytest.mark.skipif(ROOT is None, reason="SPARSE_FT_DATA_ROOT does not name a folder of public data sets")


def stand_in(name, answer_to):
    """Return what ``write_submission`` needs of a loaded model; ``answer_to`` maps a text to its answer."""
    spec = load_task(f"clue/{name}")

    def predict(texts, tasks):
        assert tasks == [spec.name]
        return [SimpleNamespace(tasks={spec.name: answer_to(text)}) for text in texts]

    return SimpleNamespace(tasks={spec.name: spec}, predict=predict)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_clue_task_but_drcd_can_be_handed_in():
    assert {load_task(f"clue/{name}").name for name in SUBMISSIONS} == set(SUBMISSIONS)
    assert len({wanted.file for wanted in SUBMISSIONS.values()}) == len(SUBMISSIONS) == 11


@real
@pytest.mark.public_data
@pytest.mark.parametrize(
    ("name", "number", "file"), [("afqmc", 3861, "afqmc"), ("tnews", 10000, "tnews11"), ("ocnli", 3000, "ocnli_50k")]
)
def test_labels_are_handed_in_as_the_codes_of_the_site_in_the_order_of_its_file(tmp_path, name, number, file):
    spec = load_task(f"clue/{name}")
    names = spec.label_names
    chosen = {}

    def answer_to(text):
        chosen.setdefault(text, names[len(chosen) % len(names)])
        return {"label": chosen[text], "score": 1.0}

    path = write_submission(stand_in(name, answer_to), name, data=Path(str(ROOT)) / name, output=tmp_path / "new")
    assert path == tmp_path / "new" / f"{file}_predict.json"
    rows = lines_of(path)
    assert [row["id"] for row in rows] == list(range(number))
    codes = set(spec.labels) if isinstance(spec.labels, dict) else set(names)
    assert {row["label"] for row in rows} == codes
    if name == "tnews":
        assert codes == {str(code) for code in range(100, 117)} - {"105", "111"}
        source = next(iter(chosen))
        assert spec.labels[rows[0]["label"]] == chosen[source]


@real
@pytest.mark.public_data
def test_entities_are_handed_in_with_inclusive_ends_that_agree_with_the_text(tmp_path):
    import gzip

    def answer_to(text):
        spans = [(0, 2), (3, 4)]
        return {"entities": [{"type": "name", "text": text[a:b], "start": a, "end": b, "score": 1.0} for a, b in spans]}

    folder = Path(str(ROOT)) / "cluener"
    rows = lines_of(write_submission(stand_in("cluener", answer_to), "cluener", data=folder, output=tmp_path))
    stored = folder / "test.json"
    content = stored.read_bytes() if stored.exists() else gzip.decompress((folder / "test.json.gz").read_bytes())
    source = [json.loads(line) for line in content.decode().splitlines()]
    assert [row["id"] for row in rows] == [row["id"] for row in source]
    assert len(rows) == 1345
    for row, line in zip(rows, source, strict=True):
        for surface, spans in row["label"]["name"].items():
            assert all(line["text"][start : end + 1] == surface for start, end in spans)


def test_spans_are_one_object_by_id(tmp_path):
    paragraph = {
        "context": "上海很好😀",
        "qas": [{"id": f"TEST_0_QUERY_{n}", "question": "哪？", "answers": []} for n in (1, 0)],
    }
    (tmp_path / "test.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}), encoding="utf-8")
    model = stand_in("cmrc2018", lambda text: {"answer": text[0][:2], "start": 0, "end": 2, "score": 1.0})
    path = write_submission(model, "cmrc2018", data=tmp_path, output=tmp_path)
    assert json.loads(path.read_text("utf-8")) == {"TEST_0_QUERY_1": "上海", "TEST_0_QUERY_0": "上海"}
    assert list(json.loads(path.read_text("utf-8"))) == ["TEST_0_QUERY_1", "TEST_0_QUERY_0"]
    assert path.name == "cmrc2018_predict.json"


def choose_longest(text):
    longest = max(range(len(text[2])), key=lambda index: len(text[2][index]))
    return {"label": text[2][longest], "choice": longest, "score": 1.0}


def test_choices_are_handed_in_by_their_place(tmp_path):
    content = [
        [
            ["文"],
            [
                {"id": 3, "question": "？", "choice": ["一", "一二"]},
                {"id": 4, "question": "？", "choice": ["一二", "三"]},
            ],
            "0",
        ]
    ]
    (tmp_path / "test1.1.json").write_text(json.dumps(content), encoding="utf-8")
    path = write_submission(stand_in("c3", choose_longest), "c3", data=tmp_path, output=tmp_path / "out")
    assert lines_of(path) == [{"id": 3, "label": 1}, {"id": 4, "label": 0}]
    passages = {"content": ["a#idiom623378#b#idiom623377#"], "candidates": ["甲", "乙乙"]}
    (tmp_path / "test1.1.json").write_text(json.dumps(passages) + "\n", encoding="utf-8")
    path = write_submission(stand_in("chid", choose_longest), "chid", data=tmp_path, output=tmp_path / "out")
    assert path.name == "chid11_predict.json"
    assert json.loads(path.read_text("utf-8")) == {"#idiom623378#": 1, "#idiom623377#": 1}


def test_what_cannot_be_handed_in_leaves_nothing_behind(tmp_path):
    model = stand_in("afqmc", lambda text: {"label": "same", "score": 1.0})
    with pytest.raises(ConfigError, match=r"Unknown task to hand in 'afqcm'\. Did you mean 'afqmc'"):
        write_submission(model, "afqcm", data=tmp_path, output=tmp_path / "out")
    with pytest.raises(DataError, match=r"test\.json' does not exist"):
        write_submission(model, "afqmc", data=tmp_path, output=tmp_path / "out")
    row = {"id": 0, "sentence1": "a", "sentence2": "b"}
    (tmp_path / "test.json").write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
    with pytest.raises(DataError, match=r"Two rows of .* have the id 0"):
        write_submission(model, "afqmc", data=tmp_path, output=tmp_path / "out")
    (tmp_path / "test.json").write_text('{"id": 0, "text": "a"}\n{"id": 1, "text": ""}\n', encoding="utf-8")
    entities = stand_in("cluener", lambda text: {"entities": []})
    with pytest.raises(DataError, match="has 2 rows, but 1 of them can be answered"):
        write_submission(entities, "cluener", data=tmp_path, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
