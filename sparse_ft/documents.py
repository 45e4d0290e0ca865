"""Read YAML, JSON and text of foreign origin: bounded, strict, and with an error that names the file.

Both languages hold the same values: null, booleans, numbers, strings, lists and mappings. YAML is read by the rules of
YAML 1.2, in which ``no`` and ``1:30`` are strings and ``1e-3`` is a number.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.yaml_schema import MAX_DEPTH, TOO_DEEP, Loader, WrittenLoader

Refusal: TypeAlias = Callable[[str], SparseFTError]
"""Turns a message into an error."""


class WrittenFloat(float):
    """A number whose ``str`` is its text in the file, e.g. ``1.10``."""

    text: str

    def __str__(self) -> str:
        return self.text


def read_yaml(path: Path, where: str | None = None, *, written: bool = False, error: Refusal = ConfigError) -> Any:
    """Read a YAML file.

    Args:
        path: The file.
        where: Name of the file, with which messages begin; None is its quoted path.
        written: Whether booleans and fractions stay the strings that stand in the file.
        error: Turns a message into the error to raise, e.g. the class of the error.

    Raises:
        SparseFTError: From ``error``, as ``parse_yaml`` does, or if the file cannot be read or is not UTF-8.
    """
    where = where or repr(str(path))
    return parse_yaml(_read(path, where, error), where, written=written, error=error)


def read_json(path: Path, where: str | None = None, *, written: bool = False, error: Refusal = ConfigError) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        where: Name of the file, with which messages begin; None is its quoted path.
        written: Whether fractions become ``WrittenFloat``.
        error: Turns a message into the error to raise, e.g. the class of the error.

    Raises:
        SparseFTError: From ``error``, as ``parse_json`` does, or if the file cannot be read or is not UTF-8.
    """
    where = where or repr(str(path))
    return parse_json(_read(path, where, error), where, written=written, error=error)


def read_json_object(path: Path, where: str | None = None, *, error: Refusal = ConfigError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.
        where: Name of the file, with which messages begin; None is its quoted path.
        error: Turns a message into the error to raise, e.g. the class of the error.

    Raises:
        SparseFTError: From ``error``, as ``read_json`` does, or if the file holds something else.
    """
    where = where or repr(str(path))
    value = read_json(path, where, error=error)
    if not isinstance(value, dict):
        raise error(f"{where} must hold an object with keys, not {type(value).__name__}.")
    return value


def parse_yaml(text: str, where: str, *, written: bool = False, error: Refusal = ConfigError) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        where: Name of the document, with which messages begin.
        written: Whether booleans and fractions stay the strings that stand in the document. Whole numbers are read as
            such only in their shortest form: ``01`` is a string.
        error: Turns a message into the error to raise, e.g. the class of the error.

    Returns:
        Null, a boolean, a number, a string, a list or a mapping.

    Raises:
        SparseFTError: From ``error``, if the text is no YAML, has a key twice, a tag of another language, more than
            MAX_DEPTH levels, aliases that repeat more than MAX_ALIASED values, or half a character.
    """
    try:
        value = yaml.load(text, Loader=WrittenLoader if written else Loader)
        _check_characters(value)
    except RecursionError as problem:
        raise error(f"{where} is not readable YAML: {TOO_DEEP}.") from problem
    except (yaml.YAMLError, ValueError) as problem:
        reason = " ".join(str(problem).replace('"<unicode string>", ', "").split())
        raise error(f"{where} is not readable YAML: {reason}.") from problem
    return value


def parse_json(text: str, where: str, *, written: bool = False, error: Refusal = ConfigError) -> Any:
    """Parse one JSON document.

    Args:
        text: The document.
        where: Name of the document, with which messages begin.
        written: Whether fractions become ``WrittenFloat``.
        error: Turns a message into the error to raise, e.g. the class of the error.

    Returns:
        Null, a boolean, a finite number, a string, a list or a mapping.

    Raises:
        SparseFTError: From ``error``, if the text is no JSON, holds NaN or Infinity, has a key twice, more than
            MAX_DEPTH levels, or half a character.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_mapping,
            parse_constant=_no_constant,
            parse_float=_written_float if written else _finite_float,
        )
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
        if _SURROGATE.search(text):
            _check_characters(value)
    except RecursionError as problem:
        raise error(f"{where} is not readable JSON: {TOO_DEEP}.") from problem
    except json.JSONDecodeError as problem:
        line = f"line {problem.lineno} " if "\n" in text.strip() else ""
        position = f"{line}column {problem.colno}"
        raise error(f"{where} is not readable JSON: {problem.msg} at {position}.") from problem
    except ValueError as problem:
        raise error(f"{where} is not readable JSON: {problem}.") from problem
    return value


def decode(content: bytes, where: str, *, error: Refusal = ConfigError) -> str:
    """Decode UTF-8 and drop a byte-order mark.

    Raises:
        SparseFTError: From ``error``, with the likely encoding and how to convert it, if the bytes are not UTF-8.
    """
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            raise error(
                f"{where} is {name}, not UTF-8: it begins with the byte-order mark {mark.hex(' ')}. "
                f"{_CONVERT.format(name)}."
            )
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        position = problem.start
        raise error(
            f"{where} is not UTF-8: byte {position} is 0x{content[position]:02x}. {_likely_encoding(content)}"
        ) from problem
    if text.count("\0", 0, 1000) * 3 > len(text[:1000]):
        name = f"UTF-16{'BE' if text.startswith(chr(0)) else 'LE'}"
        raise error(f"{where} is {name}, not UTF-8: every other byte is 0. {_CONVERT.format(name)}.")
    return text


_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_CONVERT = "Convert the file to UTF-8, e.g. `iconv -f {} -t UTF-8 OLD > NEW`"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def _read(path: Path, where: str, error: Refusal) -> str:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as problem:  # ValueError: a path with a NUL character
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{where} cannot be read: {reason}. Check the path and its permissions.") from problem
    return decode(content, where, error=error)


def _likely_encoding(content: bytes) -> str:
    """Advise how to convert bytes that are not UTF-8: UTF-16 has zeros, characters of two bytes stand in runs."""
    first, second = (content[start:1000:2].count(0) for start in (0, 1))
    if abs(first - second) * 2 > first + second:
        return f"{_CONVERT.format('UTF-16BE' if first > second else 'UTF-16LE')}, as every other byte is 0 in places."
    accents = len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", content))
    high = len(re.findall(rb"[\x80-\xff]", content))
    if accents * 2 > high:
        return f"{_CONVERT.format('WINDOWS-1252')} for many Western European files."
    try:
        content.decode("gb18030")
    except UnicodeDecodeError:
        return f"{_CONVERT.format('ENCODING')} with the encoding that it was saved in."
    return f"{_CONVERT.format('GB18030')} for many Chinese files."


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"it holds half of a character ({half!r}), as a cut emoji leaves it") from error


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for outer in level
            for part in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise ValueError(TOO_DEEP)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"the key {twice!r} stands twice in one object; leave one out")
    return mapping


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value; write a number, or null for a missing one")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _written_float(text: str) -> float:
    value = WrittenFloat(_finite_float(text))
    value.text = text
    return value
