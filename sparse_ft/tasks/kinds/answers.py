"""The answer of each task kind, and the prediction that collects the answers of all tasks to one text.

``predict --json`` writes them as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, final


class LabelScore(TypedDict):
    """A label and its probability, 0 to 1."""

    label: str
    score: float


class Entity(TypedDict):
    """A span of a text, and the mean probability of its type over its words, 0 to 1."""

    type: str
    text: str
    start: int
    """First character, in the text as given."""
    end: int
    """One past the last character."""
    score: float


@final
class LabelAnswer(LabelScore):
    """Answer of a classification: one label."""


@final
class LabelsAnswer(TypedDict):
    """Answer of a multi-label classification: all predicted labels, the most probable first."""

    labels: list[LabelScore]


@final
class EntitiesAnswer(TypedDict):
    """Answer of a token classification: entities in the order of the text."""

    entities: list[Entity]


@final
class SpanAnswer(TypedDict):
    """Answer of a span extraction: the part of the text that answers the question; empty in a text without words."""

    answer: str
    start: int
    """First character, in the text as given."""
    end: int
    """One past the last character."""
    score: float


@final
class ChoiceAnswer(LabelScore):
    """Answer of a multiple choice: one choice."""

    choice: int
    """0-based index of the choice."""


Answer = LabelAnswer | LabelsAnswer | EntitiesAnswer | SpanAnswer | ChoiceAnswer


@dataclass(frozen=True)
class Prediction:
    """The answers to one text."""

    text: str
    tasks: dict[str, Answer]
    """Task to its answer."""
    routing: dict[str, float]
    """Expert to weight: 1 for the expert of a named task; the mean over tokens and blocks if a gate mixes experts for
    that task; without a named task, the probability that the gate gives each expert. Experts of one group have the
    probability of their group, so that the sum may pass 1."""
    text_pair: str | None = None
    unknown: bool = False
    """Whether the gate rejected the text as unfamiliar to all experts; ``tasks`` is empty then."""
    choices: Sequence[str] | None = None
    left_out: Sequence[str] = ()
    """Tasks on such texts that were not answered, because no task was named and the gate, or a rule, chose others."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the row beside its texts, such as an id, as they were given."""

    def to_dict(self) -> dict[str, Any]:
        """Return the object that ``predict --json`` writes on one line."""
        line: dict[str, Any] = {**self.fields, "text": self.text}
        if self.text_pair is not None:
            line["text_pair"] = self.text_pair
        if self.choices is not None:
            line["choices"] = list(self.choices)
        line |= {"tasks": self.tasks, "routing": self.routing}
        return {**line, "unknown": True} if self.unknown else line
