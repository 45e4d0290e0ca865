"""Read YAML, JSON and text of foreign origin: bounded, strict, and with an error that names the file.

Both languages hold the same values: null, booleans, numbers, strings, lists and mappings. YAML is read by the rules of
YAML 1.2, in which ``no`` and ``1:30`` are strings and ``1e-3`` is a number. https://yaml.org/spec/1.2.2/#103-core-schema
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from sparse_ft.errors import ConfigError, SparseFTError

Refusal: TypeAlias = Callable[[str], SparseFTError]
"""Turns a message into an error."""

MAX_DEPTH = 100
"""Most lists and mappings inside each other."""
MAX_ALIASED = 10_000
"""Most values that the aliases of a YAML document may repeat."""


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
        value = yaml.load(text, Loader=_WrittenLoader if written else _Loader)
        _check_characters(value)
    except RecursionError as problem:
        raise error(f"{where} is not readable YAML: {_TOO_DEEP}.") from problem
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
        raise error(f"{where} is not readable JSON: {_TOO_DEEP}.") from problem
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
_TOO_DEEP = f"it has more than {MAX_DEPTH} lists and mappings inside each other"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def _read(path: Path, where: str, error: Refusal) -> str:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as problem:  # ValueError: a path with a NUL character
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{where} cannot be read: {reason}. Check the path and its permissions.") from problem
    return decode(content, where, error=error)


def _likely_encoding(content: bytes) -> str:
    """Advise how to convert bytes that are not UTF-8: characters of two bytes stand in runs, accents alone."""
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
    raise ValueError(_TOO_DEEP)


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


class _Loader(yaml.SafeLoader):
    """Reads the core schema of YAML 1.2 without infinities, and bounds what a short document can unfold to."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._count = 0
        self._aliased = 0
        self._sizes: dict[Any, int] = {}
        """Number of values in each node, with those that its aliases repeat."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a value, counting levels and repeated values."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            self._repeat(node, mark)
            return node
        before, self._depth = self._count, self._depth + 1
        if self._depth > MAX_DEPTH + 1:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._count += 1
        self._sizes[node] = self._count - before
        return node

    def _repeat(self, node: Any, mark: Any) -> None:
        if node not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias stands inside the value that it repeats", problem_mark=mark)
        self._count += self._sizes[node]
        self._aliased += self._sizes[node]
        if self._aliased > MAX_ALIASED:
            raise yaml.MarkedYAMLError(problem=f"aliases repeat more than {MAX_ALIASED} values", problem_mark=mark)

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping, whose keys must differ."""
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
            if name in keys:
                problem = f"the key {key.value!r} stands twice in one mapping"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(name)
        return node

    def construct_bool(self, node: Any) -> bool:
        """Construct a boolean."""
        if node.value.lower() not in {"true", "false"}:
            raise yaml.MarkedYAMLError(problem=f"{node.value!r} is no boolean", problem_mark=node.start_mark)
        return bool(node.value.lower() == "true")

    def construct_int(self, node: Any) -> int:
        """Construct a whole number."""
        return int(node.value)

    def construct_float(self, node: Any) -> Any:
        """Construct a fraction; one that is too large stays a string."""
        value = float(node.value)
        return value if math.isfinite(value) else node.value


class _WrittenLoader(_Loader):
    """Leaves booleans and fractions as they are written."""


_TAG = "tag:yaml.org,2002:"
_CONSTRUCTORS: dict[str, Any] = {
    "null": _Loader.construct_yaml_null,
    "bool": _Loader.construct_bool,
    "int": _Loader.construct_int,
    "float": _Loader.construct_float,
    "str": _Loader.construct_yaml_str,
    "seq": _Loader.construct_yaml_seq,
    "map": _Loader.construct_yaml_map,
}
_RESOLVERS = {
    "merge": ("<<", "<"),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": ("0|-?[1-9][0-9]*", "-0123456789"),
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "float": (r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", "-+.0123456789"),
}
_Loader.yaml_constructors = {}
_Loader.yaml_implicit_resolvers, _WrittenLoader.yaml_implicit_resolvers = {}, {}
for _name, _construct in _CONSTRUCTORS.items():
    _Loader.add_constructor(_TAG + _name, _construct)
_Loader.add_constructor(None, _Loader.construct_undefined)  # type: ignore[type-var]
for _name, (_pattern, _first) in _RESOLVERS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))
    if _name in {"merge", "null", "int"}:
        _WrittenLoader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))
