"""Rules: the first rule of a YAML list that holds for a text names its expert.

```yaml
- {contains: [refund, invoice], shorter_than: 500, expert: billing}
- {matches: '^def |^import ', expert: code}
- {language: zh, expert: chinese}
- {metadata: {channel: mail}, expert: mail}
- {otherwise: general}                      # without it, a text that no rule fits gets no expert
```
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from sparse_ft.documents import read_yaml
from sparse_ft.errors import ConfigError, explain, unknown_name
from sparse_ft.experts.routing import Routing
from sparse_ft.prediction.requests import Metadata
from sparse_ft.tasks.values import label_text

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3041-\u30ff"
_LETTER = f"[^\\W{_HAN}{_KANA}]"
"""A word character of a script that puts spaces between words."""


class Rule(BaseModel):
    """Conditions, all of which must hold, and the expert they lead to."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    contains: list[str] | None = Field(default=None, min_length=1)
    """Any of these words, whole and in any case; Chinese and Japanese words need no space around them."""
    matches: str | None = None
    """A regular expression that matches somewhere in the text."""
    language: str | None = None
    """The ``language`` in the metadata of the text; without it only ``zh`` is recognised, by its characters."""
    metadata: dict[str, Any] | None = Field(default=None, min_length=1)
    """Key to a single value that the metadata must hold; compared as text."""
    longer_than: int | None = Field(default=None, ge=0)
    """In characters."""
    shorter_than: int | None = Field(default=None, ge=1)
    """In characters."""
    expert: str | None = None
    otherwise: str | None = None
    """The expert of a last rule without conditions."""

    @field_validator("matches")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            text = f"not a regular expression: {error.msg} at position {error.pos}"
            raise PydanticCustomError("regular_expression", "{text}", {"text": text}) from error
        except (OverflowError, RecursionError) as error:
            text = f"not a usable regular expression: {error}"
            raise PydanticCustomError("regular_expression", "{text}", {"text": text}) from error
        return value

    @field_validator("contains")
    @classmethod
    def _words(cls, value: list[str] | None) -> list[str] | None:
        if value and not all(word.strip() for word in value):
            raise PydanticCustomError("empty_word", "a word must not be empty")
        return value

    @field_validator("metadata")
    @classmethod
    def _single(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if any(isinstance(entry, list | dict | None) for entry in (value or {}).values()):
            raise PydanticCustomError("not_single", "give a single value for each key")
        return value

    @property
    def serves(self) -> str:
        """The expert of this rule."""
        return self.expert or self.otherwise or ""

    @property
    def conditions(self) -> dict[str, Any]:
        """Name of each condition to its value."""
        return self.model_dump(exclude={"expert", "otherwise"}, exclude_none=True)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(_whole_word(word) for word in self.contains or ()), re.IGNORECASE)

    def holds(self, text: str, metadata: Metadata) -> bool:
        """Whether all conditions hold for a text and its metadata."""
        return (
            (self.shorter_than is None or len(text) < self.shorter_than)
            and (self.longer_than is None or len(text) > self.longer_than)
            and all(
                key in metadata and label_text(metadata[key]) == label_text(value)
                for key, value in (self.metadata or {}).items()
            )
            and (self.language is None or _in_language(self.language, text, metadata.get("language")))
            and (self.contains is None or self._pattern.search(text) is not None)
            and (self.matches is None or re.search(self.matches, text) is not None)
        )


def load_rules(path: str | Path) -> list[Rule]:
    """Load and check a file of rules.

    Raises:
        ConfigError: If the file cannot be read or a rule is wrong; all problems in one message.
    """
    where = f"Rules file {str(path)!r}"
    return parse_rules(read_yaml(Path(path), where), where=where)


def parse_rules(values: Any, *, where: str) -> list[Rule]:
    """Check the content of a file of rules.

    Args:
        values: The parsed YAML; a list of mappings in a valid file.
        where: Name of the file, with which messages begin.

    Raises:
        ConfigError: With every problem and the 1-based number of its rule.
    """
    if values is None or values == []:
        raise ConfigError(f"{where} is empty. Write at least one rule, e.g. `- {{contains: [refund], expert: NAME}}`.")
    if not isinstance(values, list):
        raise ConfigError(f"{where} must hold a list of rules, each begun with `- `, not {type(values).__name__}.")
    rules: list[Rule] = []
    problems = []
    for number, entry in enumerate(values, start=1):
        if not isinstance(entry, dict):
            problems.append(f"Rule {number} must be a mapping of conditions and an expert, not {entry!r}.")
            continue
        try:
            rules.append(Rule.model_validate(entry))
        except ValidationError as error:
            problems.append(f"Rule {number}: {explain(error, Rule)}")
    if not problems:  # the numbers below are right only if every rule was read
        problems = [problem for number in range(1, len(rules) + 1) if (problem := _contradiction(rules, number))]
    if problems:
        raise ConfigError(f"{where}: {' '.join(problems)}")
    return rules


def _contradiction(rules: Sequence[Rule], number: int) -> str | None:
    """Return the problem of a rule whose conditions contradict each other or the rules before; None without one."""
    rule, conditions = rules[number - 1], rules[number - 1].conditions
    if bool(rule.expert) == bool(rule.otherwise):
        return f"Rule {number} must name one expert, as `expert: NAME`, or in the last rule as `otherwise: NAME`."
    if rule.otherwise and conditions:
        return f"Rule {number} has `otherwise` and conditions ({', '.join(conditions)}); write `expert` instead."
    if rule.longer_than is not None and rule.shorter_than is not None and rule.shorter_than - rule.longer_than < 2:
        return (
            f"Rule {number} can never match: no text is longer than {rule.longer_than} and shorter than "
            f"{rule.shorter_than} characters."
        )
    for before, other in enumerate(rules[: number - 1], start=1):
        if all(conditions.get(name) == value for name, value in other.conditions.items()):
            why = "repeats or narrows the conditions of" if other.conditions else "stands behind"
            what = "" if other.conditions else ", which has no conditions and takes every text"
            return f"Rule {number} can never match: it {why} rule {before}{what}. Move it up or remove it."
    return None


class Rules:
    """Gives each text the expert of the first rule that holds, or no expert if none does.

    The same text and metadata get the same expert whatever else is in the batch.

    Args:
        names: Experts of the model that a route may choose, in its order.
        rules: As ``load_rules`` gives them.

    Raises:
        ConfigError: If a rule leads to an expert that is not in ``names``.
    """

    def __init__(self, names: Sequence[str], rules: Sequence[Rule]) -> None:
        self.names = list(names)
        self.rules = list(rules)
        unknown = [
            f"Rule {number}: {unknown_name('expert', rule.serves, self.names)}"
            for number, rule in enumerate(self.rules, start=1)
            if rule.serves not in self.names
        ]
        if unknown:
            raise ConfigError(" ".join(unknown))
        self.hits = [0] * len(self.rules)
        """How many texts each rule has decided."""

    def choose(self, texts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Routing:
        """Choose an expert for each text; the weight of a text that no rule fits is 0."""
        experts = [self._first(text, facts) for text, facts in zip(texts, metadata or [{}] * len(texts), strict=True)]
        routing = Routing.one_hot([expert or 0 for expert in experts])
        if None not in experts:
            return routing
        return Routing(routing.experts, torch.tensor([[float(expert is not None)] for expert in experts]))

    def _first(self, text: str, metadata: Metadata) -> int | None:
        for index, rule in enumerate(self.rules):
            if rule.holds(text, metadata):
                self.hits[index] += 1
                return self.names.index(rule.serves)
        return None

    def unmatched(self) -> list[int]:
        """Return the 1-based numbers of the rules with conditions that decided no row so far."""
        pairs = enumerate(zip(self.rules, self.hits, strict=True), start=1)
        return [number for number, (rule, hits) in pairs if not hits and rule.conditions]


def _whole_word(word: str) -> str:
    """Return a pattern for a word that, in a script with spaces between words, is no part of a longer one."""
    inner = r"\s+".join(re.escape(part) for part in word.split())
    start = f"(?<!{_LETTER})" if re.match(_LETTER, word.strip()) else ""
    end = f"(?!{_LETTER})" if re.match(_LETTER, word.strip()[-1]) else ""
    return start + inner + end


def _in_language(language: str, text: str, stated: Any) -> bool:
    """Compare with the stated language; without one, Chinese is a third of Chinese characters and hardly any kana."""
    wanted = language.lower().replace("_", "-")
    if stated is not None:
        tag = str(stated).lower().replace("_", "-")
        return tag == wanted or tag.partition("-")[0] == wanted
    num_letters, num_han, num_kana = (len(re.findall(kind, text)) for kind in (r"[^\W\d_]", f"[{_HAN}]", f"[{_KANA}]"))
    return wanted == "zh" and num_han > 0 and num_han * 3 >= num_letters and num_kana * 10 < num_letters
