"""One checkpoint in every form that applications use gives one answer."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from toy_checkpoints import assert_same
from toys import call
from transformers import pipeline

import sparse_ft
import sparse_ft.integrations.transformers_pipeline

TEXTS = ["the table loved", "half boring of", "", "Ada Lovelace in London, then Mozart", "company 😀 weather at six"]


def answers_of(lines, task):
    """Answers without their scores, and the scores."""
    answers = [line["tasks"][task] for line in lines]
    entries = [[answer] if "score" in answer else answer["entities"] for answer in answers]
    plain = [[{key: value for key, value in entry.items() if key != "score"} for entry in row] for row in entries]
    return plain, [entry["score"] for row in entries for entry in row]


def in_spacy(checkpoint, task):
    spacy = pytest.importorskip("spacy", reason="the extra `spacy` is not installed")
    import sparse_ft.integrations.spacy_component  # noqa: F401  # registers it where the package is not installed

    nlp = spacy.blank("en")
    nlp.add_pipe("sparse_ft", config={"checkpoint": str(checkpoint), "device": "cpu", "tasks": [task]})
    return list(nlp.pipe(TEXTS))


@pytest.mark.parametrize("task", ["mood", "names"])
def test_the_same_text_gets_the_same_answer_everywhere(tmp_path, toys, monkeypatch, capsys, task):
    loaded = [answer.to_dict() for answer in sparse_ft.load(toys, device="cpu").predict(TEXTS, task)]
    piped = pipeline("sparse-ft", model=str(toys), device="cpu", tasks=task)(TEXTS)
    (tmp_path / "texts").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    arguments = ["predict", toys, "--file", tmp_path / "texts", "--task", task, "--json", "--device", "cpu"]
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    printed = [json.loads(line) for line in out.splitlines()]
    expected, scores = answers_of(loaded, task)
    for lines in (piped, printed):
        answers, theirs = answers_of(lines, task)
        assert answers == expected
        assert theirs == pytest.approx(scores, abs=1e-6)
    docs = in_spacy(toys, task)
    if task == "names":
        spans = [[(entity.label_, entity.start_char, entity.end_char) for entity in doc.ents] for doc in docs]
        assert spans == [[(entry["type"], entry["start"], entry["end"]) for entry in entries] for entries in expected]
        return
    assert [max(doc.cats, key=doc.cats.get) for doc in docs] == [f"mood:{entries[0]['label']}" for entries in expected]
    assert [max(doc.cats.values()) for doc in docs] == pytest.approx(scores, abs=1e-6)


def test_one_object_serves_threads_that_ask_for_different_things(toys):
    model = sparse_ft.load(toys, device="cpu")
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    jobs = [
        lambda: model.predict(TEXTS, ["mood", "names", "about"]),
        lambda: model(TEXTS),  # the gate decides
        lambda: model.predict(pairs, "reply"),
        lambda: list(model.stream(TEXTS, "names")),
    ]
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: jobs[number % len(jobs)](), range(16)))
    for number, answer in enumerate(answers):
        assert_same(answer, expected[number % len(jobs)])
