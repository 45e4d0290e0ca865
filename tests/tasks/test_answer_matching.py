import random

import pytest

from sparse_ft.tasks.kinds.answer_matching import answer_f1, exact_match, segments
from sparse_ft.tasks.kinds.scores import score_answers

# An own implementation of CMRC 2018's figures, from their description: Chinese characters count one by one, other text
# by words, the signs below not at all; F1 is over the longest run that both have in common.
SIGNS = set("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")


def pieces(text):
    parts, word = [], ""
    for character in text.strip().lower():
        if character in SIGNS:
            continue
        if "\u4e00" <= character <= "\u9fa5" or character == " ":
            parts += [word, character]
            word = ""
        else:
            word += character
    return [piece for piece in [*parts, word] if piece.strip()]


def common_run(left, right):
    runs = [(a, b) for a in range(len(left)) for b in range(len(right))]
    best = 0
    for a, b in runs:
        size = 0
        while a + size < len(left) and b + size < len(right) and left[a + size] == right[b + size]:
            size += 1
        best = max(best, size)
    return best


def reference_f1(answers, guess):
    figures = []
    for answer in answers:
        left, right = pieces(answer), pieces(guess)
        common = common_run(left, right)
        precision, recall = common / max(1, len(right)), common / max(1, len(left))
        figures.append(2 * precision * recall / (precision + recall) if common else 0.0)
    return max(figures)


def reference_match(answers, guess):
    def plain(text):
        return "".join(character for character in text.lower().strip() if character not in SIGNS)

    return float(plain(guess) in map(plain, answers))


def random_answer(generator):
    return "".join(
        generator.choices(
            ["上", "海", "三", "年", "1932", " of ", "London", "，", "《", "-", "。"], k=generator.randint(0, 7)
        )
    )


def test_scores_equal_an_independent_implementation():
    generator = random.Random(3)
    references, predictions = [], []
    for _ in range(400):
        references.append([random_answer(generator) for _ in range(generator.randint(1, 3))])
        predictions.append([random_answer(generator) if generator.random() < 0.8 else references[-1][0]])
    score = score_answers(references, predictions)
    pairs = [(answers, guess) for answers, [guess] in zip(references, predictions, strict=True)]
    assert score.metrics["answer_f1"] == pytest.approx(sum(reference_f1(*pair) for pair in pairs) / 400)
    assert score.metrics["exact_match"] == pytest.approx(sum(reference_match(*pair) for pair in pairs) / 400)
    assert 0.1 < score.metrics["exact_match"] < score.metrics["answer_f1"] < 0.9


def test_one_of_several_answers_is_enough_and_the_best_counts():
    score = score_answers([["三十万册", "三十万"], ["上海"]], [["三十万"], ["北京上海市"]])
    assert score.metrics["exact_match"] == 0.5
    assert score.metrics["answer_f1"] == pytest.approx((1 + 2 * 2 / (2 + 5)) / 2)


def test_case_and_punctuation_do_not_count_but_all_else_does():
    assert exact_match("《Ada》，1932年", "ada1932年")
    assert not exact_match("1932年", "1932")
    assert answer_f1("", "") == answer_f1("，", "上") == 0.0
    assert exact_match("", "。")


@pytest.mark.parametrize(("text", "wanted"), [
    ("U.S. Army 12,400人", ["u.s.", "army", "12,400", "人"]),
    ("「CD11a」抗原", ["cd11a", "抗", "原"]),
    ("2328℃(约)", ["2328℃", "(", "约", ")"]),
    ("a,b 是", ["a", ",", "b", "是"]),
])  # fmt: skip
def test_words_and_numbers_are_one_segment(text, wanted):
    assert segments(text) == wanted
