import pytest
import torch
from torch.nn import functional

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import NO_TOKEN_LOGIT, Encoder
from sparse_ft.backbone.words import split_words
from sparse_ft.errors import ConfigError
from sparse_ft.tasks.kinds import KINDS, find_kind
from sparse_ft.tasks.kinds.kind import logits_of, probabilities_of

CLASSES, TAGS = KINDS["classification"], KINDS["token_classification"]
MANY = KINDS["multi_label"]


@pytest.fixture(scope="module")
def encoder(tiny_bert):
    return Encoder(load_backbone(str(tiny_bert)), max_length=32)


def random_logits(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def certain(tags, outputs):
    """Logits whose best tags are these."""
    return functional.one_hot(torch.tensor([outputs.index(tag) for tag in tags]), len(outputs)).float() * 9


# Finding a kind.


def test_find_kind_knows_its_names_and_suggests_for_others():
    assert {name: find_kind(name) for name in KINDS} == KINDS
    assert {name: kind.level for name, kind in KINDS.items()} == {
        "classification": "text",
        "multi_label": "text",
        "token_classification": "word",
        "span_extraction": "word",
        "multiple_choice": "text",
    }
    with pytest.raises(ConfigError, match=r"Unknown kind 'multilabel'\. Did you mean 'multi_label'\? Known: classific"):
        find_kind("multilabel")


# Losses.


@pytest.mark.parametrize("kind", [CLASSES, TAGS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_over_what_is_not_ignored(kind, smoothing):
    logits, targets = random_logits(9, 4), torch.tensor([0, -100, 3, 1, -100, 2, 2, 0, 1])
    log_probabilities = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    losses = []
    for row, target in zip(log_probabilities, targets.tolist(), strict=True):
        if target != -100:
            losses.append(-(1 - smoothing) * row[target] - smoothing * row.mean())
    got = kind.loss(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(got.double(), torch.stack(losses).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_multi_label_loss_is_the_mean_binary_cross_entropy(smoothing):
    logits = random_logits(5, 3)
    targets = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]])
    wanted = targets.double() * (1 - smoothing) + smoothing / 2
    p = logits.double().sigmoid()
    expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
    torch.testing.assert_close(MANY.loss(logits, targets, label_smoothing=smoothing).double(), expected)


# Encoding.


def test_a_class_becomes_its_place_and_an_unseen_or_hidden_one_is_ignored(encoder):
    columns = {"text": ["a fox", "a dog", "fox", ""], "label": ["dog", "cat", None, "fox"]}
    examples = CLASSES.encode(columns, encoder=encoder, labels=["fox", "dog"], language="en")
    assert [example.targets for example in examples] == [[1], [-100], [-100], [0]]
    assert [example.input_ids for example in examples] == [e.input_ids for e in encoder.texts(columns["text"])]
    bare = CLASSES.encode({"text": columns["text"]}, encoder=encoder, labels=["fox", "dog"], language="en")
    assert [example.targets for example in bare] == [[], [], [], []]


def test_a_pair_is_encoded_as_one_row_of_two_texts(encoder):
    columns = {"text": ["a fox", "fox"], "text_pair": ["a dog", ""], "label": ["yes", "no"]}
    examples = CLASSES.encode(columns, encoder=encoder, labels=["no", "yes"], language="en")
    assert [example.targets for example in examples] == [[1], [0]]
    assert examples == [
        type(example)(example.row, example.input_ids, example.token_type_ids, targets=targets)
        for example, targets in zip(encoder.texts(*list(columns.values())[:2]), [[1], [0]], strict=True)
    ]
    assert 1 in examples[0].token_type_ids


def test_labels_of_a_text_become_indicators_and_an_unseen_one_none(encoder):
    columns = {"text": ["a"] * 5, "labels": [["b"], [], ["c", "a"], ["unseen", "a"], None]}
    examples = MANY.encode(columns, encoder=encoder, labels=["a", "b", "c"], language="en")
    assert [example.targets for example in examples] == [[0, 1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert all(isinstance(value, float) for example in examples for value in example.targets)


def test_tags_follow_their_words_into_windows_and_an_unseen_tag_is_ignored(encoder):
    tags = ["O", "B-PER", "I-PER", "B-LOC", "B-UNSEEN", "O"]
    columns = {
        "tokens": [["fox", "Ada", "Lovelace", "Lisbon", "Acme", "."] * 9, ["Ada", "\u200b", "Lisbon"], []],
        "tags": [tags * 9, ["B-PER", "O", "B-LOC"], []],
    }
    outputs = TAGS.outputs(["PER", "LOC"])
    examples = TAGS.encode(columns, encoder=encoder, labels=["PER", "LOC"], language="en")
    assert sum(example.row == 0 for example in examples) >= 3
    targets = {}
    for example in examples:
        assert len(example.targets) == len(example.word_positions)
        for word, target in zip(example.word_indices, example.targets, strict=True):
            targets[example.row, word] = target
    for (row, word), target in targets.items():
        tag = columns["tags"][row][word]
        assert target == (outputs.index(tag) if tag in outputs else -100)
    assert len(targets) == 6 * 9 + 2  # no gold tag is lost but that of the dropped character


@pytest.mark.parametrize("language", ["en", "zh"])
def test_raw_text_is_split_into_words_before_it_is_tagged(encoder, language):
    text = "Ada 在 Lisbon, U.S."
    words = [word.text for word in split_words(text, language)]
    from_text = TAGS.encode({"text": [text]}, encoder=encoder, labels=["PER"], language=language)
    assert from_text == TAGS.encode({"tokens": [words]}, encoder=encoder, labels=["PER"], language=language)


# Decoding.


def test_predictions_are_the_best_labels():
    logits = random_logits(6, 3)
    labels = ["x", "y", "z"]
    assert CLASSES.predictions(list(logits), columns={}, labels=labels) == [labels[row.argmax()] for row in logits]
    assert MANY.predictions(list(logits), columns={}, labels=labels) == [
        [label for label, logit in zip(labels, row.tolist(), strict=True) if logit >= 0] for row in logits
    ]
    assert MANY.predictions([torch.tensor([-1.0, -2.0, -0.1])], columns={}, labels=labels) == [[]]
    tags = TAGS.outputs(["A"])
    rows = [random_logits(4, 3), random_logits(0, 3), random_logits(1, 3)]
    assert TAGS.predictions(rows, columns={}, labels=["A"]) == [[tags[word.argmax()] for word in row] for row in rows]


def test_a_perfect_prediction_scores_one_for_every_kind():
    from sparse_ft.tasks.kinds.scores import Score

    for kind, truth, labels in (
        (CLASSES, ["x", "y", "x"], ["x", "y"]),
        (MANY, [["x"], ["x", "y"], ["y"]], ["x", "y"]),
        (TAGS, [["B-PER", "I-PER", "O"], ["O", "B-LOC"]], ["PER", "LOC"]),
    ):
        score = kind.score(truth, truth, labels=labels, out_of_scope=None)
        assert isinstance(score, Score)
        assert set(score.metrics.values()) == {1.0}, kind


def test_the_answer_of_a_classification_is_its_label_and_probability():
    logits = random_logits(3)
    answer = CLASSES.answer(logits, text="a", labels=["x", "y", "z"], language="en")
    best = int(logits.argmax())
    assert answer["label"] == ["x", "y", "z"][best]
    assert answer["score"] == pytest.approx(float(logits.exp()[best] / logits.exp().sum()))


def test_the_answer_of_multi_label_lists_what_is_probable_most_probable_first():
    logits = torch.tensor([0.5, -3.0, 2.0, 0.0])
    answer = MANY.answer(logits, text="a", labels=["w", "x", "y", "z"], language="en")
    assert [entry["label"] for entry in answer["labels"]] == ["y", "w", "z"]
    assert [entry["score"] for entry in answer["labels"]] == pytest.approx(
        [1 / (1 + 2.718281828**-logit) for logit in (2.0, 0.5, 0.0)]
    )
    assert MANY.answer(torch.tensor([-1.0]), text="a", labels=["w"], language="en") == {"labels": []}


@pytest.mark.parametrize(("text", "tags", "entities"), [
    ("Ada met Charles Babbage.", "B-PER O B-PER I-PER O", ["Ada", "Charles Babbage"]),
    ("  Lisbon\t\tand\n Rome ", "B-LOC O B-LOC", ["Lisbon", "Rome"]),
    ("New\t York", "B-LOC I-LOC", ["New\t York"]),
    ("👩‍👩‍👧 in 😀Lisbon😀", None, ["Lisbon"]),
    ("cafe\u0301 Rene\u0301 in Z\u0308urich", None, ["Z\u0308urich"]),
    ("Ｌｉｓｂｏｎ（Ｒｏｍｅ）", None, ["Ｌｉｓｂｏｎ", "Ｒｏｍｅ"]),
    ("Lisbon’s U.S. trip", None, ["Lisbon", "U.S."]),
    ("Rome Rome", "B-LOC B-LOC", ["Rome", "Rome"]),
    ("", "", []),
    (" \t\n", "", []),
    ("nobody here", "O O", []),
])  # fmt: skip
def test_entities_are_slices_of_the_text_as_given(text, tags, entities):
    words = split_words(text, "en")
    from_words = ["B-LOC" if word.text in entities else "O" for word in words]
    tags = from_words if tags is None else tags.split()
    assert len(tags) == len(words), words
    outputs = TAGS.outputs(["PER", "LOC"])
    logits = certain(tags, outputs) if tags else torch.zeros(0, 5)
    answered = TAGS.answer(logits, text=text, labels=["PER", "LOC"], language="en")["entities"]
    assert [entity["text"] for entity in answered] == entities
    for entity in answered:
        assert set(entity) == {"type", "text", "start", "end", "score"}
        assert text[entity["start"] : entity["end"]] == entity["text"]
    assert [entity["start"] for entity in answered] == sorted(entity["start"] for entity in answered)
    begun = [tag.partition("-")[2] for index, tag in enumerate(tags) if tag[0] == "B" or tags[0][0] == tag[0] == "I"]
    assert [entity["type"] for entity in answered] == begun


def test_chinese_entities_are_found_character_by_character():
    text = "我在 上海住了３年😀"
    words = split_words(text, "zh")
    tags = ["B-LOC" if word.text == "上" else "I-LOC" if word.text == "海" else "O" for word in words]
    logits = certain(tags, TAGS.outputs(["LOC"]))
    [entity] = TAGS.answer(logits, text=text, labels=["LOC"], language="zh")["entities"]
    assert (entity["text"], entity["start"], entity["end"]) == ("上海", 3, 5)


def test_the_score_of_an_entity_is_the_mean_probability_of_its_type():
    outputs = TAGS.outputs(["LOC"])
    logits = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0], [3.0, 0.0, 0.0]])
    [entity] = TAGS.answer(logits, text="New York wins", labels=["LOC"], language="en")["entities"]
    assert outputs == ["O", "B-LOC", "I-LOC"]
    probabilities = logits.softmax(-1)
    assert entity["score"] == pytest.approx(float((probabilities[:2, 1] + probabilities[:2, 2]).mean()))
    [entity] = TAGS.answer(torch.tensor([[0.0, 1.0, 9.0]]), text="Berg", labels=["LOC"], language="en")["entities"]
    assert entity["score"] == pytest.approx(1 - 1 / (1 + 2.718281828 + 2.718281828**9), abs=1e-6)


@pytest.mark.parametrize(("text", "language", "tags", "entities"), [
    ("Helen Marsh\nBristol", "en", "B-A I-A I-A", [(0, 11), (12, 19)]),
    ("Helen\n\nMarsh", "zh", "B-A I-A I-A I-A I-A I-A I-A I-A I-A I-A", [(0, 5), (7, 12)]),
    ("\ufeffMarta \x02Lindqvist\u200f met", "en", "B-A I-A O", [(1, 17)]),
    ("Gothen\ufffdburg\x00", "en", "B-A", [(0, 11)]),
    ("dans l'Allemagne.Elle", "fr", "O O B-A O O", [(7, 16)]),
    ("Ankara'da", "tr", "B-A O", [(0, 6)]),
])  # fmt: skip
def test_where_entities_begin_and_end(text, language, tags, entities):
    logits = certain(tags.split(), TAGS.outputs(["A"]))
    answered = TAGS.answer(logits, text=text, labels=["A"], language=language)["entities"]
    assert [(entity["start"], entity["end"]) for entity in answered] == entities


def test_words_without_a_token_are_inside_an_entity_and_do_not_count_in_its_score():
    logits = torch.tensor([[0.0, 2.0, 0.0], [0.0, NO_TOKEN_LOGIT, NO_TOKEN_LOGIT], [0.0, 0.0, 2.0]])
    [entity] = TAGS.answer(logits, text="New \ue000 York", labels=["LOC"], language="en")["entities"]
    seen = logits[[0, 2]].softmax(-1)[:, 1:].sum(1)
    assert (entity["text"], entity["score"]) == ("New \ue000 York", pytest.approx(float(seen.mean())))


@pytest.mark.parametrize("name", KINDS)
def test_probabilities_and_logits_are_each_others_inverse(name):
    kind = KINDS[name]
    shares = probabilities_of(kind, torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)))
    assert float(shares.min()) > 0
    assert float(shares.max()) < 1
    torch.testing.assert_close(probabilities_of(kind, logits_of(kind, shares)), shares)
    if kind.grouped:  # over the words or choices of a row
        torch.testing.assert_close(shares.sum(1), torch.ones(3, 2))
