"""Answers as people read them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_ft.tasks.kinds.answers import Answer, Prediction

_MOST_NAMES = 4
"""Tasks that a line names."""


def format_prediction(prediction: "Prediction") -> str:
    """Show the answers to one text for people: the text, then a line a task."""
    parts = [prediction.text, prediction.text_pair, *(prediction.choices or [])]
    lines = ["\t".join(part for part in parts if part is not None)]
    if prediction.unknown:
        return f"{lines[0]}\n  unknown: no expert is for such a text"
    width = max((len(task) for task in prediction.tasks), default=0)
    lines.extend(f"  {task:<{width}}  {_format_answer(answer)}" for task, answer in prediction.tasks.items())
    if prediction.left_out:
        lines.append(f"  not answered: {_listed(prediction.left_out)}")
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    """List names; of many the first and the number of further ones."""
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{names[0]} and {len(names) - 1} others"


def _format_answer(answer: "Answer") -> str:
    if "label" in answer:
        return f"{answer['label']} ({answer['score']:.2f})"
    if "answer" in answer:
        return f"{answer['answer']} [{answer['start']}-{answer['end']}] ({answer['score']:.2f})"
    if "labels" in answer:
        return ", ".join(f"{entry['label']} ({entry['score']:.2f})" for entry in answer["labels"]) or "none"
    entities = [
        f"{entry['text']} [{entry['type']} {entry['start']}-{entry['end']}] ({entry['score']:.2f})"
        for entry in answer["entities"]
    ]
    return ", ".join(entities) or "no entities"
