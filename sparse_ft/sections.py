"""Sections of settings: frozen, without unknown keys, and with strict types whatever the values come from."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict

MAX_SEED = 2**63 - 1
"""Largest seed that all generators of random numbers take."""

_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


class Section(BaseModel):
    """Settings that only hold values of their own types: a boolean is no number, and a number in quotes is text.

    Numbers must be finite; an integer may stand for a number with a fraction, which must not stand for an integer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _flag(value: Any) -> Any:
    """Read the words that YAML 1.1 takes for booleans, and YAML 1.2 for text."""
    return _WORDS.get(value.lower(), value) if isinstance(value, str) else value


Flag = Annotated[bool, BeforeValidator(_flag)]
"""true or false; old files may also say yes, no, on or off."""
Texts = Annotated[list[str], Strict(False)]
"""A list, or any other sequence, of texts."""
