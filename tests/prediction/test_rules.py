"""Rules: conditions, the order of rules, and what a wrong file is told."""

import pytest
import torch

from sparse_ft.errors import ConfigError
from sparse_ft.prediction.rules import Rule, Rules, load_rules, parse_rules

NAMES = ["general", "billing", "chinese", "code"]


def rule(**conditions):
    """A rule from conditions as they stand in YAML."""
    return Rule.model_validate({"expert": "billing", **conditions})


def answers(rules, texts, metadata=()):
    """The name of each row's expert, or None."""
    routing = rules.choose(texts, metadata)
    return [
        rules.names[expert] if weight else None
        for expert, weight in zip(routing.experts[:, 0].tolist(), routing.weights[:, 0].tolist(), strict=True)
    ]


# One condition.


@pytest.mark.parametrize(
    ("words", "text", "holds"),
    [
        (["refund"], "Where is my REFUND?", True),
        (["Refund"], "refund", True),
        (["refund"], "refunded", False),
        (["refund"], "re-refund_x", False),
        (["refund", "invoice"], "the invoice.", True),
        (["refund", "invoice"], "nothing", False),
        (["new york"], "in New\n York today", True),
        (["a.c"], "abc", False),
        (["a.c"], "(a.c)", True),
        (["C++"], "I write c++, mostly", True),
        (["c"], "c++", True),
        (["naïve"], "NAÏVE!", True),
        (["naive"], "naiveté", False),
        (["退款"], "我要退款了", True),
        (["退款"], "order123退款abc", True),
        (["iphone"], "我买了iPhone手机", True),
        (["iphone"], "我买了iPhones手机", False),
        (["カード"], "このカードは", True),
    ],
)
def test_contains_finds_whole_words_in_any_case(words, text, holds):
    assert rule(contains=words).holds(text, {}) is holds


@pytest.mark.parametrize(
    ("pattern", "text", "holds"),
    [
        (r"^def ", "def f(): pass", True),
        (r"^def ", "  def f()", False),
        (r"\d{4}", "in 1984.", True),
        ("A", "a", False),
    ],
)
def test_matches_finds_a_regular_expression_anywhere(pattern, text, holds):
    assert rule(matches=pattern).holds(text, {}) is holds


@pytest.mark.parametrize(
    ("language", "text", "metadata", "holds"),
    [
        ("zh", "今天天气很好", {}, True),
        ("zh", "我在 Berlin 买了 iPhone 手机和一台很贵的笔记本电脑", {}, True),
        ("zh", "The word 你好 means hello, as everybody knows", {}, False),
        ("zh", "今日はとても天気がいいですね", {}, False),
        ("zh", "12345 !?", {}, False),
        ("zh", "", {}, False),
        ("zh", "hello", {"language": "zh-CN"}, True),
        ("zh", "今天天气很好", {"language": "ja"}, False),
        ("en", "hello", {}, False),
        ("en", "hello", {"language": "EN"}, True),
        ("en", "hello", {"language": "en_GB"}, True),
        ("en-gb", "hello", {"language": "en_GB"}, True),
        ("en_GB", "hello", {"language": "en-gb"}, True),
        ("en-gb", "hello", {"language": "en"}, False),
        ("en", "hello", {"language": "eng"}, False),
        ("en", "hello", {"language": None}, False),
    ],
)
def test_the_language_is_what_the_metadata_say_and_else_chinese_by_its_characters(language, text, metadata, holds):
    assert rule(language=language).holds(text, metadata) is holds


@pytest.mark.parametrize(
    ("wanted", "metadata", "holds"),
    [
        ({"channel": "mail"}, {"channel": "mail", "more": 1}, True),
        ({"channel": "mail"}, {"channel": "Mail"}, False),
        ({"channel": "mail"}, {}, False),
        ({"priority": 1}, {"priority": "1"}, True),
        ({"priority": 1}, {"priority": True}, False),
        ({"vip": True}, {"vip": True}, True),
        ({"vip": True}, {"vip": "true"}, True),
        ({"vip": "true"}, {"vip": False}, False),
        ({"channel": "mail", "priority": 1}, {"channel": "mail", "priority": 2}, False),
    ],
)
def test_all_metadata_must_be_as_given(wanted, metadata, holds):
    assert rule(metadata=wanted).holds("", metadata) is holds


def test_lengths_are_in_characters_and_exclude_the_number():
    lengths = [number for number in range(8) if rule(longer_than=2, shorter_than=6).holds("字" * number, {})]
    assert lengths == [3, 4, 5]


def test_all_conditions_of_a_rule_must_hold():
    both = rule(contains=["refund"], longer_than=10, metadata={"channel": "mail"})
    assert both.holds("a refund, please", {"channel": "mail"})
    assert not both.holds("a refund", {"channel": "mail"})
    assert not both.holds("an invoice, please", {"channel": "mail"})
    assert not both.holds("a refund, please", {})


# The rules.

YAML = """
- {contains: [refund, invoice], expert: billing}
- {language: zh, expert: chinese}
- {matches: '^(def|import) ', longer_than: 8, expert: code}
- {contains: [unicorn], expert: code}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "rules.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_the_first_rule_that_holds_wins_and_without_one_no_expert_serves(write):
    rules = Rules(NAMES, load_rules(write(YAML)))
    texts = ["import refund", "我要退款", "import torch", "import", "hello"]
    assert answers(rules, texts) == ["billing", "chinese", "code", None, None]
    assert rules.hits == [1, 1, 1, 0]
    assert rules.unmatched() == [4]
    assert answers(rules, ["a unicorn"]) == ["code"]
    assert rules.unmatched() == []


def test_otherwise_takes_what_is_left_and_its_silence_is_no_fault(write):
    rules = Rules(NAMES, load_rules(write(YAML + "- {otherwise: general}\n")))
    assert answers(rules, ["hello", "invoice"]) == ["general", "billing"]
    assert rules.unmatched() == [2, 3, 4]
    fresh = Rules(NAMES, rules.rules)
    answers(fresh, ["invoice"])
    assert 5 not in fresh.unmatched()


def test_weights_are_one_or_zero_and_one_expert_for_all_is_known_to_be(write):
    rules = Rules(NAMES, load_rules(write(YAML)))
    routing = rules.choose(["refund", "hello", "我要退款"])
    assert routing.weights.tolist() == [[1.0], [0.0], [1.0]]
    assert routing.weights.dtype == torch.float32
    assert routing.experts.dtype == torch.int64
    assert rules.choose(["refund", "invoice"]).only == 1
    assert rules.choose(["hello", "you"]).only is None
    assert rules.choose([]).weights.shape[0] == 0


def test_a_text_gets_the_same_answer_in_any_batch(write):
    rules = Rules(NAMES, load_rules(write(YAML)))
    texts = ["import refund", "我要退款", "import torch", "hello"]
    assert answers(rules, texts[::-1]) == answers(rules, texts)[::-1]
    assert [answers(rules, [text])[0] for text in texts] == answers(rules, texts)


def test_rules_read_the_metadata_of_each_text():
    rules = Rules(NAMES, parse_rules([{"metadata": {"kind": "x"}, "expert": "code"}], where="here"))
    assert rules.choose(["", ""], [{"kind": "x"}, {}]).weights.tolist() == [[1.0], [0.0]]


def test_rules_are_frozen_and_survive_a_round_trip(write):
    rules = load_rules(write(YAML + "- {otherwise: general}\n"))
    assert parse_rules([entry.model_dump(exclude_none=True) for entry in rules], where="here") == rules
    with pytest.raises(ValueError, match="frozen"):
        rules[0].expert = "general"


# Mistakes.

CONDITIONS = "contains, matches, language, metadata, longer_than, shorter_than, expert, otherwise"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"Rules file '.*rules\.yaml' is empty\. Write at least one rule, e\.g\. `- \{contains: \[refund\]"),
        ("# nothing\n", r"is empty\. Write"),
        ("[]", r"is empty\. Write"),
        ("contains: [x]\nexpert: code\n", r"must hold a list of rules, each begun with `- `, not dict\.$"),
        ("- [unclosed", r"is not readable YAML: while parsing .* line 1"),
        (b"- {expert: \xff}", "is not UTF-8: byte 11 is 0xff"),
        ("- code", r"Rule 1 must be a mapping of conditions and an expert, not 'code'\.$"),
        (
            "- {contians: [x], expert: code}",
            rf"Rule 1: Unknown key 'contians'\. Did you mean 'contains'\? Known: {CONDITIONS}\.$",
        ),
        ("- {contains: x, expert: code}", r"Rule 1: contains: Input should be a valid list \(got 'x'\)\.$"),
        ("- {contains: [], expert: code}", r"Rule 1: contains: List should have at least 1 item"),
        (
            "- {contains: ['x', ' '], expert: code}",
            r"Rule 1: contains: a word must not be empty \(got \['x', ' '\]\)\.$",
        ),
        ("- {language: true, expert: code}", r"Rule 1: language: Input should be a valid string \(got True\)"),
        ("- {longer_than: -1, expert: code}", r"Rule 1: longer_than: Input should be greater than or equal to 0"),
        (
            "- {contains: [x], expert: code}\n- {matches: 'ab(c', expert: code}",
            r"Rule 2: matches: not a regular expression: missing \), unterminated subpattern at position 2 "
            r"\(got 'ab\(c'\)\.$",
        ),
        (
            "- {matches: 'a{99999999999}', expert: code}",
            "not a usable regular expression: the repetition number is too",
        ),
        ("- {metadata: {a: [1, 2]}, expert: code}", r"Rule 1: metadata: give a single value for each key \(got"),
        (
            "- {contains: [x]}",
            r"Rule 1 must name one expert, as `expert: NAME`, or in the last rule as `otherwise: NAME`\.$",
        ),
        ("- {expert: a, otherwise: b}", r"Rule 1 must name one expert"),
        (
            "- {contains: [x], longer_than: 3, otherwise: b}",
            r"Rule 1 has `otherwise` and conditions \(contains, longer_than\); write `expert` instead\.$",
        ),
        (
            "- {longer_than: 5, shorter_than: 6, expert: code}",
            r"Rule 1 can never match: no text is longer than 5 and shorter than 6 characters\.$",
        ),
        (
            "- {contains: [x], expert: code}\n- {otherwise: general}\n- {contains: [y], expert: code}",
            r"Rule 3 can never match: it stands behind rule 2, which has no conditions and takes every text\. "
            r"Move it up or remove it\.$",
        ),
        (
            "- {expert: general}\n- {otherwise: code}",
            r"Rule 2 can never match: it stands behind rule 1, which has no conditions",
        ),
        (
            "- {contains: [x], expert: code}\n- {contains: [x], longer_than: 9, expert: general}",
            r"Rule 2 can never match: it repeats or narrows the conditions of rule 1\. Move it up or remove it\.$",
        ),
    ],
)
def test_a_wrong_file_is_told_in_one_paragraph(write, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_rules(write(text))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("Rules file '")


def test_all_problems_of_a_file_come_at_once(write):
    with pytest.raises(ConfigError, match=r"Rule 1: Unknown key 'expret'.* Rule 3: matches: not a regular"):
        load_rules(write("- {expret: code}\n- {expert: code}\n- {matches: '[', expert: code}\n"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"Rules file '.*none\.yaml' cannot be read: No such file or directory\. Check"
    ):
        load_rules(tmp_path / "none.yaml")


def test_an_expert_that_the_model_does_not_have_is_named_with_those_it_has(write):
    rules = load_rules(
        write("- {contains: [x], expert: biling}\n- {contains: [y], expert: code}\n- {otherwise: zzz}\n")
    )
    message = (
        r"^Rule 1: Unknown expert 'biling'\. Did you mean 'billing'\? Known: general, billing, chinese, code\. "
        r"Rule 3: Unknown expert 'zzz'\. Known: general, billing, chinese, code\.$"
    )
    with pytest.raises(ConfigError, match=message):
        Rules(NAMES, rules)
