"""Spans: windows lose no answer, offsets are those of the text as given, and the softmax is over all of a text."""

import random

import pytest
import torch

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.words import split_words
from sparse_ft.experts.inference import row_logits
from sparse_ft.tasks.kinds import KINDS

SPANS = KINDS["span_extraction"]


def columns_of(text, question, *answers, language="zh"):
    words = split_words(text, language)
    return {
        "text": [text],
        "text_pair": [question],
        "tokens": [[word.text for word in words]],
        "starts": [[word.start for word in words]],
        "ends": [[word.end for word in words]],
        "answers": [list(answers)],
        "answer_starts": [[text.find(answer) for answer in answers]],
    }


def encoded(columns, family, tiny_folder, *, max_length=32):
    encoder = Encoder(load_backbone(str(tiny_folder(family))), max_length=max_length)
    return encoder, SPANS.encode(columns, encoder=encoder, labels=[], language="zh")


def certain(examples, columns):
    """The logits of a model that knows the targets, one row a word, as ``row_logits`` puts them together."""
    logits = torch.full((len(columns["tokens"][0]), 2), -1e4)
    logits[:, 0] = 0.0
    for example in examples:
        for word, target in zip(example.word_indices, example.targets, strict=True):
            logits[word] = torch.tensor([5.0 * (target & 1), 5.0 * (target >> 1)]) - 2.0
    return logits


LONG = "今天上海的天气很好，图书馆建于１９３２年，藏书三十万册。" * 8


@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta-v2"])
@pytest.mark.parametrize("place", [0, 97, len(LONG) - 6])
def test_windows_lose_no_answer(tiny_folder, family, place):
    text = LONG[:place] + "甲乙😀丙" + LONG[place:]
    columns = columns_of(text, "哪一个？", "甲乙😀丙")
    encoder, examples = encoded(columns, family, tiny_folder)
    assert len(examples) > 5
    assert all(len(example.input_ids) <= encoder.max_length for example in examples)
    owned = [word for example in examples for word in example.word_indices]
    assert sorted(owned) == sorted(set(owned))  # every word once
    assert SPANS.predictions([certain(examples, columns)], columns=columns, labels=[]) == [["甲乙😀丙"]]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("在\u200b上海\u200b。", "\u200b上海\u200b"),  # the tokenizer drops these characters
        ("我❤\ufe0f你", "❤\ufe0f"),
        ("（ＬＩＢ）建于１９３２年", "ＬＩＢ"),
        ("他 住 在 上 海 。", "上 海"),
        ("上", "上"),
        ("1932年", "32年"),
    ],
)
def test_an_answer_is_found_though_the_tokenizer_changes_the_text(tiny_folder, text, answer):
    columns = columns_of(text, "？", "没有", answer)
    _, examples = encoded(columns, "bert", tiny_folder)
    [[predicted]] = SPANS.predictions([certain(examples, columns)], columns=columns, labels=[])
    assert predicted.strip("\u200b\ufe0f") == answer.strip("\u200b\ufe0f")
    marked = [target for example in examples for target in example.targets]
    assert [sum(target & bit > 0 for target in marked) for bit in (1, 2)] == [1, 1]
    best = SPANS.answer(certain(examples, columns), text=text, labels=[], language="zh")
    assert text[best["start"] : best["end"]] == best["answer"] == predicted


def test_the_question_stands_before_every_window_and_leaves_room_for_the_text(tiny_folder):
    question = "哪一年" * 50
    columns = columns_of(LONG, question, "三十万册")
    encoder, examples = encoded(columns, "bert", tiny_folder, max_length=40)
    start = examples[0].input_ids[:20]
    assert all(example.input_ids[:20] == start for example in examples)
    assert start[-1] == encoder.between[0]
    for example in examples:
        assert example.token_type_ids == [0] * 20 + [1] * (len(example.input_ids) - 20)
        assert all(position >= 20 for position in example.word_positions)
    short = encoder.words([["上", "海"]], questions=["哪"])[0]
    assert short.input_ids == encoder.texts(["哪"], ["上 海"])[0].input_ids


def test_without_answers_there_is_nothing_to_learn_and_an_empty_text_has_an_empty_answer(tiny_folder):
    for answers in ([], ["没有"]):
        _, examples = encoded(columns_of(LONG, "？", *answers), "bert", tiny_folder)
        assert {target for example in examples for target in example.targets} == {-100}
    empty = {"text": [""], "text_pair": ["谁？"]}
    _, [example] = encoded(empty, "bert", tiny_folder)
    assert example.word_positions == []
    assert SPANS.num_parts(empty, language="zh") == [0]
    assert SPANS.answer(torch.zeros(0, 2), text="", labels=[], language="zh")["answer"] == ""


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_cross_entropy_of_start_and_end_over_all_words(smoothing):
    logits = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)) * 3
    targets = torch.tensor([0, 0, 1, 0, 0, 2, 0, 0, 0])
    log_probabilities = logits.double() - logits.double().exp().sum(0).log()
    right = [log_probabilities[2, 0], log_probabilities[5, 1]]
    wanted = -sum((1 - smoothing) * value for value in right) / 2 - smoothing * log_probabilities.mean()
    torch.testing.assert_close(SPANS.loss(logits, targets, label_smoothing=smoothing), wanted.float())
    single = SPANS.loss(logits, torch.tensor([0, 0, 0, 3, 0, 0, 0, 0, 0]), label_smoothing=0.0)
    torch.testing.assert_close(single, -log_probabilities[3].mean().float())


def test_the_score_is_the_probability_of_start_and_end():
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    best = SPANS.answer(logits, text="上海很好", labels=[], language="zh")
    probabilities = logits.exp() / logits.exp().sum(0)
    assert best["score"] == pytest.approx(float(probabilities[best["start"], 0] * probabilities[best["end"] - 1, 1]))


def test_logits_do_not_depend_on_other_texts(make_model):
    model = make_model("bert", {"reading": ("word", 2)})
    encoder = Encoder(model.backbone, max_length=32)
    generator = random.Random(0)
    texts = [LONG[: generator.randint(1, 150)] for _ in range(6)]
    columns = {"text": texts, "text_pair": ["哪" * index for index in range(6)]}
    together = answers(model, encoder, columns)
    for row in range(6):
        alone = answers(model, encoder, {name: values[row : row + 1] for name, values in columns.items()})[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def answers(model, encoder, columns):
    examples = SPANS.encode(columns, encoder=encoder, labels=[], language="zh")
    parts = SPANS.num_parts(columns, language="zh")
    return row_logits(model, "reading", examples, num_rows=len(columns["text"]), num_parts=parts)
