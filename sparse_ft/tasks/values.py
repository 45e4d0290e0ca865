"""Values of a source as text: exactly what stands there, or an error. Nothing is guessed."""

import ast
import math
import re
from collections.abc import Collection
from decimal import Decimal
from typing import Any

from sparse_ft.documents import WrittenFloat
from sparse_ft.errors import DataError

_ITEM = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?)"""
_LIST = re.compile(rf"\[\s*(?:{_ITEM}\s*(?:,\s*{_ITEM}\s*)*)?\]")


def label_text(value: Any) -> str:
    """Write a value as the text that a file would hold: ``true``, ``1``, ``1.10``, ``news``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not isinstance(value, WrittenFloat) and value.is_integer():
        return str(int(value))
    return str(value)


def exact_text(value: Any, name: str, location: str) -> str:
    """Return a string, or a number as it is written.

    Args:
        value: A value of a row.
        name: Noun for the value, e.g. ``"label"``.
        location: File and line, for messages.

    Raises:
        DataError: If the value is neither, e.g. null, NaN, a boolean, a list or an object.
    """
    if isinstance(value, str) or _is_number(value):
        return label_text(value)
    raise DataError(f"{location}: {name} is {_described(value)}. Expected a string or a number. {_advice(value, name)}")


def label_key(value: Any, name: str, location: str, declared: Collection[str]) -> str:
    """Return the text of a label, tag or type; a boolean is one if the task declares it.

    Args:
        value: A value of a row.
        name: Noun for the value.
        location: File and line, for messages.
        declared: Source values and names that the task declares.

    Raises:
        DataError: As ``exact_text`` does, or if the text is empty.
    """
    spellings = ["true", "True", "TRUE"] if value is True else ["false", "False", "FALSE"] if value is False else []
    if isinstance(value, WrittenFloat):
        spellings = [value.text, label_text(float(value))]
    text = next((spelling for spelling in spellings if spelling in declared), None)
    text = exact_text(value, name, location) if text is None else text
    if not text:
        raise DataError(f"{location}: {name} is an empty string. Name it, or leave it out.")
    return text


def list_cell(text: str) -> list[Any] | None:
    """Parse a list that pandas wrote into a cell, e.g. ``['a', 'b']``; None for any other text."""
    text = text.strip()
    if not _LIST.fullmatch(text):
        return None
    return list(ast.literal_eval(text))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)


def _described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    noun = {list: "the list ", dict: "the object ", float: "", Decimal: ""}.get(
        type(value), f"a {type(value).__name__}, "
    )
    shown = repr(value)
    return f"{noun}{shown[:60]}{'…' if len(shown) > 60 else ''}"


def _advice(value: Any, name: str) -> str:
    if isinstance(value, bool) and name != "text":
        return (
            "Write it as a string, or name it under `labels` in the task file, e.g. `labels: {true: yes, false: no}`."
        )
    if isinstance(value, list) and name == "label":
        return "Take the one label out of the list, or set `kind: multi_label` for rows with several."
    if isinstance(value, list):
        return "Join it in the file, or name the column as a list, e.g. `columns: {text: [keywords]}`, to join it here."
    return "Correct the row, or `columns` in the task file."
