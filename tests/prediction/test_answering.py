"""Texts that name their own tasks, and rules that choose for them: the answers are those of asking for each alone."""

import re
from dataclasses import replace

import pytest
import torch
from toy_checkpoints import assert_same, passes
from toys import JOINT, SINGLE, varied_texts

import sparse_ft
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.prediction.loaded_model import CHUNK

RULES = """\
- {metadata: {channel: mail}, expert: about}
- {language: de, expert: names}
- {contains: [loved, boring], shorter_than: 40, expert: mood}
- {contains: ["?"], expert: reply}
"""


@pytest.fixture(scope="module")
def model(toys):
    return sparse_ft.load(toys, device="cpu")


@pytest.fixture(scope="module")
def ruled(toys, tmp_path_factory):
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(RULES)
    return sparse_ft.load(toys, device="cpu", rules=file)


def each_alone(model, rows):
    """Ask for the tasks of each row in a call of its own."""
    texts = [(row["text"], row["text_pair"]) if "text_pair" in row else row["text"] for row in rows]
    return [model.predict([text], row["tasks"])[0] for text, row in zip(texts, rows, strict=True)]


# Tasks of their own


def test_texts_with_tasks_of_their_own_are_answered_as_alone(model):
    asked = ["mood", ["names"], ["names", "mood"], "about", SINGLE]
    rows = [{"text": text, "tasks": asked[place % 5]} for place, text in enumerate(varied_texts(40))]
    pair = {"text": "the table", "text_pair": "half loved", "tasks": ["reply"]}
    assert_same(model.predict([*rows, pair]), each_alone(model, [*rows, pair]))
    assert_same(model.predict([pair, *rows[::-1]]), each_alone(model, [pair, *rows[::-1]]))
    assert [list(answer.tasks) for answer in model.predict(rows[:5])] == [
        ["mood"],
        ["names"],
        ["names", "mood"],
        ["about"],
        SINGLE,
    ]


@pytest.mark.parametrize("kind", JOINT)
def test_tasks_that_a_gate_mixes_are_answered_as_alone(kind, joint_toys):
    mixture = sparse_ft.load(joint_toys(kind), device="cpu")
    asked = ["mood", ["names", "about"], "all"]
    rows = [{"text": text, "tasks": asked[place % 3]} for place, text in enumerate(varied_texts(10))]
    found, alone = mixture.predict(rows), each_alone(mixture, rows)
    for one, other in zip(found, alone, strict=True):
        assert one.tasks.keys() == other.tasks.keys()
        assert one.routing == pytest.approx(other.routing, abs=1e-5)
        assert_same([replace(one, routing={})], [replace(other, routing={})])


def test_rows_of_different_tasks_run_as_one_batch(model):
    rows = [
        {"text": "the table loved", "tasks": "mood"},
        {"text": "Ada met Mozart in London", "tasks": "names"},
        {"text": "music and football", "tasks": ["about"]},
        {"text": "the table", "text_pair": "half loved", "tasks": "reply"},
    ]
    assert passes(model, lambda: model.predict(rows)) == 1


def test_texts_with_and_without_tasks_of_their_own_keep_their_places(model):
    texts = varied_texts(CHUNK // 2)
    rows = [{"text": text, "tasks": "about"} if place % 3 else text for place, text in enumerate(texts)]
    found = model.predict(rows, ["mood"])
    assert [answer.text for answer in found] == texts
    assert [list(answer.tasks) for answer in found] == [
        ["about"] if place % 3 else ["mood"] for place in range(len(rows))
    ]
    by_gate = model([rows[0], rows[1]])
    assert by_gate[0] == model(texts[0])
    assert list(by_gate[1].tasks) == ["about"]
    assert list(model.stream(iter(rows), "mood")) == found


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "loved", "tasks": "moood"}, "Unknown task in this model 'moood'. Did you mean 'mood'?"),
        ({"text": "loved", "tasks": ["reply"]}, "Task 'reply' reads two texts a row, got one: 'loved'"),
        ({"text": "loved", "tasks": []}, "The field 'tasks' of a row is '[]'"),
        ({"text": "loved", "tasks": [1]}, "The field 'tasks' of a row is '[1]'"),
        ({"text": 7}, "The field 'text' of a row is '7'"),
        ({"text": "loved", "metadata": "mail"}, "The field 'metadata' of a row is 'mail'"),
        ({"tasks": "mood"}, "The field 'text' of a row is missing"),
    ],
)
def test_rows_that_make_no_sense_are_refused(model, row, said):
    with pytest.raises((ConfigError, DataError), match=re.escape(said)):
        model.predict(["loved", row])


def test_experts_answer_together_only_for_all_texts_alike(model):
    with pytest.raises(ConfigError, match="'loved' names its own tasks, 'mood', and combine='average'"):
        model.predict(["boring", {"text": "loved", "tasks": "mood"}], ["mood", "about"], combine="average")


# Rules


def test_rules_choose_by_text_language_and_metadata(ruled, model):
    rows = [
        {"text": "the table loved"},
        {"text": "the table loved", "metadata": {"channel": "mail"}},
        {"text": "Ada met Mozart", "metadata": {"language": "de-AT"}},
        {"text": "the table?", "text_pair": "half of the weather"},
        {"text": "Ada met Mozart"},
    ]
    found = ruled.predict(rows)
    assert [list(answer.tasks) for answer in found] == [["mood"], ["about"], ["names"], ["reply"], []]
    assert [answer.unknown for answer in found] == [False] * 4 + [True]
    assert [answer.routing for answer in found] == [{"mood": 1.0}, {"about": 1.0}, {"names": 1.0}, {"reply": 1.0}, {}]
    known = [{**row, "tasks": list(answer.tasks)} for row, answer in zip(rows[:4], found, strict=False)]
    assert_same(found[:4], each_alone(model, known))
    assert ruled.rules.unmatched() == []
    assert ruled("half boring").tasks.keys() == {"mood"}


def test_named_tasks_win_over_rules(ruled, model):
    assert_same(ruled.predict(["loved"], "about"), model.predict(["loved"], "about"))
    assert list(ruled.predict([{"text": "loved", "tasks": "names"}])[0].tasks) == ["names"]


def test_rules_choose_an_expert_of_a_joint_checkpoint(tmp_path, joint_toys):
    kind = next(kind for kind, changes in JOINT.items() if "experts__pool" not in changes)
    path = joint_toys(kind)
    (tmp_path / "rules.yml").write_text("- {otherwise: mood}\n")
    answer = sparse_ft.load(path, device="cpu", rules=tmp_path / "rules.yml")("the table loved")
    assert answer.routing == {"mood": 1.0}
    assert "mood" in answer.tasks


def test_rules_that_send_a_text_where_nobody_reads_it_are_refused(ruled):
    with pytest.raises(
        DataError, match="The rules send 'which table\\?' to expert 'reply', which serves no task on one"
    ):
        ruled(["which table?"])


def test_rules_are_read_before_the_checkpoint(toys, tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml' cannot be read"):
        sparse_ft.load(tmp_path / "nothing", rules=tmp_path / "no.yaml")
    (tmp_path / "rules.yaml").write_text("- {contains: [a], expert: moood}\n")
    with pytest.raises(ConfigError, match="Rule 1: Unknown expert 'moood'"):
        sparse_ft.load(toys, device="cpu", rules=tmp_path / "rules.yaml")


def test_a_single_row_is_a_list_of_one(model):
    row = {"text": "the table loved", "tasks": ["mood"]}
    (found,) = model.predict(row)
    assert list(found.tasks) == ["mood"]
    assert model(row) == found
    assert list(model.stream(row)) == [found]
    assert sparse_ft.predict(model, row) == [found]


def test_logits_and_probabilities_take_a_single_text(model):
    for answer in (model.logits, model.probabilities):
        assert torch.equal(answer("the table loved", "mood"), answer(["the table loved"], "mood"))


def test_probabilities_have_the_labels_of_their_columns(model):
    shares = dict(zip(model.labels("mood"), model.probabilities("the table loved", "mood")[0].tolist(), strict=True))
    answer = model.predict(["the table loved"], ["mood"])[0].tasks["mood"]
    assert max(shares, key=shares.get) == answer["label"]
    assert shares[answer["label"]] == pytest.approx(answer["score"])


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        b"loved",
        ("loved",),
        ["loved", "boring"],
        "\ud800 half",
        ("loved", None, ["\ud800", "b"]),
        ("loved", None, None),
        ("loved", None, []),
    ],
)
def test_rules_see_only_texts(ruled, text):
    with pytest.raises(DataError, match=r"Expected a text|no Unicode"):
        ruled.predict(["loved", text])
