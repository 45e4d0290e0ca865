"""Write JSON for standard output and files: finite numbers only, as its standard demands."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from sparse_ft.errors import SparseFTError


def json_text(content: Any, *, indent: int | None = None) -> str:
    """Return content as JSON, on one line or indented.

    Args:
        content: Objects with strings as keys, lists, strings, numbers, booleans and None.
        indent: Spaces a level; None writes one line.

    Raises:
        SparseFTError: If a number is NaN or infinite; the message names its key.
    """
    try:
        return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        for key, number in _numbers(content):
            if not math.isfinite(number):
                raise SparseFTError(
                    f"{key or 'The value'} is {number}, which JSON cannot hold. Expected a finite number; nothing was "
                    "written. A damaged checkpoint or a metric without a value gives such numbers."
                ) from error
        raise


def null_if_undefined(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Replace scores that are not finite by None: a correlation with a constant has no value."""
    return {name: score if math.isfinite(score) else None for name, score in scores.items()}


def _numbers(content: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield every fraction in content with its dotted key."""
    if isinstance(content, float):
        yield key, content
    parts = dict(enumerate(content)) if isinstance(content, list | tuple) else content
    for name, part in parts.items() if isinstance(parts, Mapping) else ():
        yield from _numbers(part, f"{key}.{name}" if key else str(name))
