"""The errors that a user can cause, and the wording of their messages."""

import difflib
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ValidationError


class SparseFTError(Exception):
    """Base of all errors that a user can correct; the command line prints them as one paragraph and exits with 2."""


class ConfigError(SparseFTError):
    """A setting, a name or a combination of options is wrong."""


class DataError(SparseFTError):
    """A data file is missing, malformed or does not fit its task."""


class BackboneError(SparseFTError):
    """A backbone cannot be found, read or adapted."""


class CheckpointError(SparseFTError):
    """A checkpoint is missing, incomplete or does not fit."""


class ExportError(SparseFTError):
    """An export cannot give, or does not give, the answers of its checkpoint."""


def unknown_name(noun: str, name: str, known: Iterable[str]) -> str:
    """Word the message for an unknown name.

    Args:
        noun: Noun for the name, e.g. ``"task"``.
        name: The name as the user wrote it.
        known: All accepted names.

    Returns:
        One paragraph: the value, the closest accepted name if one is close, and the list of accepted names.
    """
    names = [str(entry) for entry in known]
    by_lower = {entry.lower(): entry for entry in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    hint = f" Did you mean {by_lower[close[0]]!r}?" if close else ""
    return f"Unknown {noun} {name!r}.{hint} Known: {name_list(names) or 'none'}."


def name_list(names: Sequence[str]) -> str:
    """Join names for a message: at most 40, and those with line breaks and the like in quotes."""
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:40])
    return shown + (f", … ({len(names)} in all)" if len(names) > 40 else "")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Word all problems of a pydantic validation as ``field: message``, with a suggestion for unknown keys.

    Args:
        error: The error that pydantic raised.
        model: The validated model, whose fields are the accepted keys.
    """
    problems = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            problems.append(unknown_name("key", field, _keys(model)))
        elif not problem["loc"] and "error" in problem.get("ctx", {}):  # of several fields together
            problems.append(f"{problem['ctx']['error']}.")
        else:
            advice = ""
            if problem["type"] == "string_type" and isinstance(problem["input"], int | float):
                advice = " Put it in quotes."
            if problem["type"] in {"int_type", "float_type"} and isinstance(problem["input"], str):
                advice = " Write a number in digits, without quotes, _ or leading zeros."
            problems.append(f"{name_list([field])}: {problem['msg']} (got {problem['input']!r:.200}).{advice}")
    return " ".join(problems)


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """List all accepted keys of a model and its sections, dotted."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys.extend(_keys(inner, f"{prefix}{name}."))
    return keys
