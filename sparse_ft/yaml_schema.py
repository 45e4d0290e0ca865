"""The YAML that is read and written: the core schema of version 1.2, bounded.

https://yaml.org/spec/1.2.2/#103-core-schema
"""

import math
import re
from typing import Any

import yaml

MAX_DEPTH = 100
"""Most lists and mappings inside each other."""
MAX_ALIASED = 10_000
"""Most values that the aliases of a document may repeat."""
TOO_DEEP = f"it has more than {MAX_DEPTH} lists and mappings inside each other"


def yaml_text(content: Any) -> str:
    """Write mappings, lists, strings, numbers, booleans and null as YAML that versions 1.1 and 1.2 read alike."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class Loader(yaml.SafeLoader):
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
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=mark)
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


class WrittenLoader(Loader):
    """Leaves booleans and fractions as they are written."""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that either version would read as something else."""


_TAG = "tag:yaml.org,2002:"
_CONSTRUCTORS: dict[str, Any] = {
    "null": Loader.construct_yaml_null,
    "bool": Loader.construct_bool,
    "int": Loader.construct_int,
    "float": Loader.construct_float,
    "str": Loader.construct_yaml_str,
    "seq": Loader.construct_yaml_seq,
    "map": Loader.construct_yaml_map,
}
_RESOLVERS = {
    "merge": ("<<", "<"),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": ("0|-?[1-9][0-9]*", "-0123456789"),
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "float": (r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", "-+.0123456789"),
}
Loader.yaml_constructors = {}
Loader.yaml_implicit_resolvers, WrittenLoader.yaml_implicit_resolvers = {}, {}
for _name, _construct in _CONSTRUCTORS.items():
    Loader.add_constructor(_TAG + _name, _construct)
Loader.add_constructor(None, Loader.construct_undefined)  # type: ignore[type-var]
for _name, (_pattern, _first) in _RESOLVERS.items():
    Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))
    if _name in {"merge", "null", "int"}:
        WrittenLoader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))
