"""Choices: one example each, a softmax over those of a row, however many there are, and blanks that are never lost."""

import pytest
import torch

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.words import BLANK
from sparse_ft.experts.inference import row_logits
from sparse_ft.tasks.kinds import KINDS
from sparse_ft.tasks.kinds.multiple_choice import around_blank

CHOICES = KINDS["multiple_choice"]
COLUMNS = {
    "text": ["Ada met Charles", "the table", "上海的天气"],
    "text_pair": ["Who ?", "What ?", "哪？"],
    "choices": [["Ada", "Mozart and London"], ["the", "table", "fox", "dog"], ["好"]],
    "answer": [1, 2, None],
}


@pytest.fixture(scope="module")
def encoder(tiny_bert):
    return Encoder(load_backbone(str(tiny_bert)), max_length=48)


def encode(columns, encoder):
    return CHOICES.encode(columns, encoder=encoder, labels=[], language="zh")


def test_every_choice_is_an_example_that_ends_with_it(encoder):
    examples = encode(COLUMNS, encoder)
    assert [(example.row, *example.word_indices) for example in examples] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 0),
    ]
    assert [example.targets for example in examples] == [[0], [1], [0], [0], [1], [0], [-100]]
    assert examples[1].input_ids == encoder.texts(["Ada met Charles"], ["Who ? Mozart and London"])[0].input_ids
    assert CHOICES.num_parts(COLUMNS, language="en") == [2, 4, 1]
    bare = {name: COLUMNS[name] for name in ("text", "text_pair", "choices")}
    assert all(example.targets == [] for example in encode(bare, encoder))
    without = encode({**bare, "text_pair": [None] * 3}, encoder)
    assert without[0].input_ids == encoder.texts(["Ada met Charles"], ["Ada"])[0].input_ids


@pytest.mark.parametrize("length", [0, 5, 60, 400])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_blank_is_never_cut_off(tiny_folder, length, side):
    filler = "天气很好。" * length
    text = f"{filler}去{BLANK}？" if side == "left" else f"去{BLANK}？{filler}"
    choices = ["三年", "百尺竿头更进一步"]
    for family in ("bert", "gpt2"):
        encoder = Encoder(load_backbone(str(tiny_folder(family))), max_length=48)
        cut = around_blank(text, choices, encoder)
        assert BLANK in cut
        assert cut in text
        examples = encode({"text": [text], "choices": [choices]}, encoder)
        for example, choice in zip(examples, choices, strict=True):
            assert example.input_ids == encoder.tokenizer(cut, choice)["input_ids"]  # nothing more is cut
            assert len(example.input_ids) <= 48


def test_the_loss_is_the_cross_entropy_over_the_choices_of_a_row():
    logits = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 0, 1, 0, 0])
    log_probabilities = logits.double().squeeze() - logits.double().exp().sum().log()
    torch.testing.assert_close(CHOICES.loss(logits, targets, label_smoothing=0.0), -log_probabilities[2].float())
    smoothed = -0.8 * log_probabilities[2] - 0.2 * log_probabilities.mean()
    torch.testing.assert_close(CHOICES.loss(logits, targets, label_smoothing=0.2), smoothed.float())


def test_the_best_choice_is_predicted_and_answered():
    logits = [torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0]])]
    assert CHOICES.predictions(logits, columns={}, labels=[]) == [1, 0]
    best = CHOICES.answer(logits[0], text="", labels=["甲", "乙"], language="zh")
    assert (best["label"], best["choice"]) == ("乙", 1)
    assert best["score"] == pytest.approx(1 / (1 + 2.718281828**-2))
    assert CHOICES.score([1, 0, 2], [1, 0, 1], labels=[], out_of_scope=None).metrics == {
        "accuracy": pytest.approx(2 / 3)
    }


def test_logits_do_not_depend_on_other_rows_nor_on_other_choices(make_model):
    model = make_model("bert", {"reading": ("text", 1)})
    encoder = Encoder(model.backbone, max_length=48)

    def logits(columns):
        examples, parts = encode(columns, encoder), CHOICES.num_parts(columns, language="en")
        return row_logits(model, "reading", examples, num_rows=len(columns["text"]), num_parts=parts)

    together = logits(COLUMNS)
    assert [tuple(row.shape) for row in together] == [(2, 1), (4, 1), (1, 1)]
    for row in range(3):
        alone = {name: values[row : row + 1] for name, values in COLUMNS.items()}
        torch.testing.assert_close(logits(alone)[0], together[row], atol=1e-5, rtol=1e-5)
        for index, choice in enumerate(COLUMNS["choices"][row]):
            [single] = logits({**alone, "choices": [[choice]]})
            torch.testing.assert_close(single[0], together[row][index], atol=1e-5, rtol=1e-5)
