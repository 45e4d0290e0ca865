"""The answers to one text: a form for each task kind, and all of them together, as ``predict --json`` writes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, final


class LabelScore(TypedDict):
    """A label and its probability, 0 to 1."""

    label: str
    score: float


class Entity(TypedDict):
    """A span of a text, and the mean probability of its tags, 0 to 1."""

    type: str
    text: str
    start: int
    """First character, in the text as given."""
    end: int
    """One past the last character."""
    score: float


@final
class LabelAnswer(LabelScore):
    """Of a classification: the one label."""


@final
class LabelsAnswer(TypedDict):
    """Of a multi-label classification: all labels that hold, the most probable first."""

    labels: list[LabelScore]


@final
class EntitiesAnswer(TypedDict):
    """Of a token classification: entities in the order of the text."""

    entities: list[Entity]


@final
class SpanAnswer(TypedDict):
    """Of a span extraction: the part of the text that answers the question; empty in a text without words."""

    answer: str
    start: int
    """First character, in the text as given."""
    end: int
    """One past the last character."""
    score: float


@final
class ChoiceAnswer(LabelScore):
    """Of a multiple choice: the one choice."""

    choice: int
    """Its place, from 0."""


Answer = LabelAnswer | LabelsAnswer | EntitiesAnswer | SpanAnswer | ChoiceAnswer


@dataclass(frozen=True)
class Prediction:
    """The answers to one text."""

    text: str
    tasks: dict[str, Answer]
    """Task to its answer, in the form of its kind."""
    routing: dict[str, float]
    """Expert to weight: 1 where a task was named that one expert serves; the mean over tokens and blocks where the gate
    mixes for it; else what the gate thinks of every expert."""
    text_pair: str | None = None
    unknown: bool = False
    """Whether the gate turned the text away as unlike anything the experts know; ``tasks`` is empty then."""
    choices: Sequence[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a line of ``predict --json`` holds."""
        pair: dict[str, Any] = {} if self.text_pair is None else {"text_pair": self.text_pair}
        if self.choices is not None:
            pair["choices"] = list(self.choices)
        unknown = {"unknown": True} if self.unknown else {}
        return {"text": self.text, **pair, "tasks": self.tasks, "routing": self.routing, **unknown}
