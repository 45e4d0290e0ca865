"""The reading tasks of CLUE as they are shipped, in samples written by hand with what the real files hold in store."""

import gzip
import json
import logging

import pytest
import yaml

from sparse_ft.backbone.words import BLANK
from sparse_ft.errors import DataError
from sparse_ft.tasks.reading import label_names, read
from sparse_ft.tasks.spec import load_task, parse_task

CONTEXT = "图书馆（ＬＩＢ）建于1932年，藏书😀三十万册。1932年，馆长是Ada。"


def squad(*questions, context=CONTEXT):
    asked = [
        {"id": f"DEV_0_QUERY_{index}", "question": question, "answers": answers}
        for index, (question, answers) in enumerate(questions)
    ]
    return {
        "version": "v1.0",
        "data": [{"id": "DEV_0", "title": "", "paragraphs": [{"context": context, "qas": asked}]}],
    }


def answer(text, start):
    return {"text": text, "answer_start": start}


def write(folder, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path = folder / f"{name.replace('__', '.')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def task(name, folder, **changes):
    spec = load_task(f"clue/{name}")
    return spec.model_copy(update={"files": spec.files.model_copy(update=changes)}), folder


# CMRC 2018 and DRCD.


def test_answers_are_found_where_they_stand_whatever_their_start_says(tmp_path, caplog):
    questions = [
        (
            "哪年？",
            [answer("1932年", CONTEXT.rindex("1932")), answer("1932", 0), answer("建于1932年", CONTEXT.index("建于"))],
        ),
        ("多少？", [answer("三十万册", CONTEXT.index("三十") + 2)]),  # off by the emoji, as in files counted in UTF-16
        ("谁？", [answer("Ada", -1)]),
        ("没有？", [answer("四十万册", -1)]),
        ("先错后对？", [answer("没有的", 3), answer("馆长", 4)]),
    ]
    folder = write(tmp_path, train=squad(*questions), dev=squad(*questions[:1]))
    spec = load_task("clue/cmrc2018")
    with caplog.at_level(logging.WARNING):
        rows = read(spec, data=folder, splits=["train"])["train"]
    assert "1 of 5 questions have no answer that stands in the text" in caplog.text
    assert list(rows["text_pair"]) == [question for question, _ in questions]
    assert rows["answers"][0] == ["1932年", "1932", "建于1932年"]
    for texts, starts, context in zip(rows["answers"], rows["answer_starts"], rows["text"], strict=True):
        assert all(
            start < 0 or context[start : start + len(text)] == text for text, start in zip(texts, starts, strict=True)
        )
    assert rows["answer_starts"][0][0] == CONTEXT.rindex("1932")  # the one that was meant, though it stands there twice
    assert [max(starts) < 0 for starts in rows["answer_starts"]] == [False, False, False, True, False]
    assert rows["answer_starts"][4] == [-1, CONTEXT.index("馆长")]
    for word, start, end in zip(rows["tokens"][0], rows["starts"][0], rows["ends"][0], strict=True):
        assert CONTEXT[start:end] == word
    assert label_names(spec, rows) == []


def test_hidden_answers_are_none_and_those_of_drcd_are_read(tmp_path):
    fakes = [answer(f"FAKE_ANSWER_{number}", -1) for number in (1, 2, 3)]
    folder = write(tmp_path, test=squad(("谁？", fakes), ("谁？", [])))
    hidden = read(load_task("clue/cmrc2018"), data=folder, splits=["test"])["test"]
    assert list(hidden["answers"]) == [None, None]
    folder = write(tmp_path / "drcd", test=squad(("谁？", [{"id": "1", **answer("Ada", CONTEXT.index("Ada"))}])))
    assert read(load_task("clue/drcd"), data=folder, splits=["test"])["test"]["answers"][0] == ["Ada"]


@pytest.mark.parametrize(("content", "message"), [
    ({"version": "v1.0"}, "an object has no 'data'. Expected the shape of SQuAD"),
    ([], "an object has no 'data'"),
    ({"data": [{"paragraphs": [{"qas": [{"question": "a"}]}]}]}, "the paragraph of 1 has no 'context'"),
    (squad(("谁？", [])), "question 1: the question has no answer"),
    (squad(("谁？", ["Ada"])), r"question 1: answers must be \[\{\"text\", \"answer_start\"\}, …\]"),
    (squad(("谁？", [answer("Ada", 1)]), ("谁？", None)), "question 2: a row of train has no answers"),
    ("{", "is not readable JSON"),
    ({"data": None}, "train.json': its beginning does not have the shape of the format 'squad'"),
    ({"data": [{"paragraphs": [{"context": "c", "qas": ["who"]}]}]}, "'str' object is not a mapping"),
])  # fmt: skip
def test_what_is_no_squad_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(load_task("clue/cmrc2018"), data=write(tmp_path, train=content, dev=content), splits=["train"])


def test_answers_side_by_side_as_on_the_hub(tmp_path):
    row = {"text": "上海很好", "text_pair": "哪？", "answers": {"text": ["上海", "上"], "answer_start": [0, 0]}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    content = {"name": "own", "kind": "span_extraction", "language": "zh", "metric": "answer_f1"}
    spec = parse_task({**content, "files": {"format": "jsonl", "train": "train.jsonl", "validation": "v"}}, where="own")
    rows = read(spec, data=tmp_path, splits=["train"])["train"]
    assert (rows["answers"][0], rows["answer_starts"][0]) == (["上海", "上"], [0, 0])


# C3.


def c3_entry(*questions, documents=("男：几点了？", "女：差一刻八点。"), number="25-35"):
    return [list(documents), list(questions), number]


CLOCK = {"question": "现在几点？", "choice": ["7:45", "8:00", "8:15"], "answer": "7:45"}


def test_c3_gives_a_row_a_question_with_its_own_choices(tmp_path):
    more = {"question": "谁问？", "choice": ["男的", "女的"], "answer": "男的"}
    five = {"question": "？", "choice": list("甲乙丙丁戊"), "answer": "戊"}
    write(tmp_path, **{"d-train": [c3_entry(CLOCK, more)], "m-train": [c3_entry(five, documents=["一段\n文字。"])]})
    rows = read(load_task("clue/c3"), data=tmp_path, splits=["train"])["train"]
    assert list(rows["text"]) == ["男：几点了？\n女：差一刻八点。"] * 2 + ["一段\n文字。"]
    assert [len(choices) for choices in rows["choices"]] == [3, 2, 5]
    assert list(rows["answer"]) == [0, 0, 4]
    assert list(rows["row"]) == [0, 1, 2]


def test_the_answers_of_c3_may_be_hidden_in_test_only(tmp_path):
    asked = {"id": 7, "question": "现在几点？", "choice": ["7:45", "8:00"]}
    folder = write(tmp_path, test1__1=[c3_entry(asked), c3_entry({**asked, "answer": ""})])
    assert list(read(load_task("clue/c3"), data=folder, splits=["test"])["test"]["answer"]) == [None, None]
    spec, folder = task("c3", folder, train="test1.1.json")
    with pytest.raises(DataError, match="question 1"):
        read(spec, data=folder, splits=["train"])


@pytest.mark.parametrize(("question", "message"), [
    ({**CLOCK, "answer": "9:00"}, r"the answer '9:00' is none of the choices, nor the index of one from 0 to 2: 7:45"),
    ({**CLOCK, "answer": 3}, "the answer 3 is none of the choices"),
    ({**CLOCK, "choice": []}, "choices must be a list of texts with one at least"),
    ({**CLOCK, "choice": "7:45"}, "choices must be a list of texts"),
])  # fmt: skip
def test_wrong_choices_are_named(tmp_path, question, message):
    write(tmp_path, **{"d-train": [c3_entry(CLOCK, question)], "m-train": [c3_entry(CLOCK)]})
    with pytest.raises(DataError, match=f"question 2: {message}"):
        read(load_task("clue/c3"), data=tmp_path, splits=["train"])


def test_what_is_no_c3_is_named(tmp_path):
    write(tmp_path, **{"d-train": [{"question": "a"}], "m-train": []})
    with pytest.raises(DataError, match=r"entry 1: expected \[\[document, …\], \[question, …\], id\]"):
        read(load_task("clue/c3"), data=tmp_path, splits=["train"])


# ChID.

CANDIDATES = [
    "百尺竿头",
    "随波逐流",
    "方兴未艾",
    "身体力行",
    "一日千里",
    "三十而立",
    "逆水行舟",
    "日新月异",
    "百花齐放",
    "沧海一粟",
]
PASSAGES = {
    "content": ["……希望能#idiom000378#再进一步😀。", "去#idiom000379#？还是#idiom000380#，另走一条路。", "没有空。"],
    "candidates": CANDIDATES,
}


def test_every_blank_of_chid_is_a_row_and_the_others_are_dots(tmp_path):
    answers = {"#idiom000378#": 0, "#idiom000379#": 1, "#idiom000380#": 6, "#idiom000999#": 2}
    write(tmp_path, train=json.dumps(PASSAGES, ensure_ascii=False) + "\n", train_answer=answers)
    rows = read(load_task("clue/chid"), data=tmp_path, splits=["train"])["train"]
    assert list(rows["text"]) == [
        f"……希望能{BLANK}再进一步😀。",
        f"去{BLANK}？还是……，另走一条路。",
        f"去……？还是{BLANK}，另走一条路。",
    ]
    assert [CANDIDATES[index] for index in rows["answer"]] == ["百尺竿头", "随波逐流", "逆水行舟"]
    assert rows["choices"][1] == CANDIDATES


def test_chid_is_read_compressed_and_without_answers_where_they_are_hidden(tmp_path):
    line = json.dumps(PASSAGES, ensure_ascii=False) + "\n"
    (tmp_path / "test1.1.json.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(line.encode()))
    answers = {f"#idiom000{number}#": 3 for number in (378, 379, 380)}
    (tmp_path / "dev_answer.json.gz").write_bytes(gzip.compress(json.dumps(answers).encode()))
    splits = read(load_task("clue/chid"), data=tmp_path, splits=["validation", "test"])
    assert list(splits["validation"]["answer"]) == [3, 3, 3]
    assert list(splits["test"]["answer"]) == [None, None, None]


def test_a_blank_without_an_answer_is_named(tmp_path):
    write(tmp_path, train=json.dumps(PASSAGES), train_answer={"#idiom000378#": 0})
    with pytest.raises(DataError, match="the answers beside the file have none for #idiom000379#"):
        read(load_task("clue/chid"), data=tmp_path, splits=["train"])
    (tmp_path / "train_answer.json").unlink()
    with pytest.raises(DataError, match="blank 1: a row of train has no answer"):
        read(load_task("clue/chid"), data=tmp_path, splits=["train"])


def test_a_question_under_our_own_name_is_read(tmp_path):
    rows = [
        {"text": f"story {index}", "text_pair": "Who ?", "choices": ["Ada", "Bob"], "answer": 0} for index in (1, 2)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"format": "jsonl", "train": "train.jsonl"}
    content = {"name": "own", "kind": "multiple_choice", "metric": "accuracy", "files": files}
    train = read(parse_task(content, where="own"), data=tmp_path, splits=["train"])["train"]
    assert list(train["text_pair"]) == ["Who ?"]  # the other row is validation's
    rows = [{name: value for name, value in row.items() if name != "text_pair"} for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        "text_pair" not in read(parse_task(content, where="own"), data=tmp_path, splits=["train"])["train"].column_names
    )


def test_the_examples_of_the_task_files_are_rows(tmp_path):
    for name in ("c3", "chid"):
        row = json.loads(load_task(f"clue/{name}").example)
        assert set(row) <= {"text", "text_pair", "choices"}
        assert len(row["choices"]) > 1
    assert yaml.safe_dump(load_task("clue/cmrc2018").example).count("\\t") == 1
