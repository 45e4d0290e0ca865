"""Small damages to files: what disks, editors, spreadsheets and careless or hostile people do to them."""

import copy
import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3.5, 2**70, 1e300, float("nan"), float("inf"), "", " ", "x", "no", "1:30", "01",
    "../up", "/etc/passwd", "~nouser/x", "a" * 300, "\x00", "\ufeff", "上海", "evaluate:accuracy",
    [], {}, [[]], [None], ["a", "b"], {"a": 1}, {"name": None},
)  # fmt: skip
"""Values that take the place of a node of JSON or YAML."""

DEEP = "[" * 5000
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 9)
)
"""YAML of ten lines that expands to nine to the ninth nodes."""


def mutate(file: Path, generator: random.Random) -> str:
    """Damage a file in place; return what was done."""
    content = file.read_bytes()
    ways: list[Callable[[bytes, random.Random], tuple[bytes, str]]] = [_bytes, _encoding]
    ways += _BY_SUFFIX.get(file.suffix, [_line]) * 3
    damaged, done = generator.choice(ways)(content, generator)
    file.write_bytes(damaged)
    return f"{file.name}: {done}"


def _bytes(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    start = generator.randrange(len(content) + 1)
    end = min(len(content), start + generator.choice([1, 1, 8, 100]))
    noise = bytes(generator.randrange(256) for _ in range(generator.choice([1, 4])))
    return generator.choice([
        (content[:start], f"cut at byte {start}"),
        (content[:start] + content[end:], f"bytes {start} to {end} are gone"),
        (content[:start] + noise + content[start + len(noise) :], f"noise at byte {start}"),
        (content[:start] + noise + content[start:], f"noise is inserted at byte {start}"),
        (content[:end] + content[start:], f"bytes {start} to {end} are there twice"),
        (b"", "empty"),
    ])  # fmt: skip


def _encoding(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    text = content.decode("utf-8", errors="replace")
    name = generator.choice(["utf-16", "utf-8-sig", "gb18030", "latin-1"])
    return generator.choice([
        (text.encode(name, errors="replace"), f"in {name}"),
        (text.replace("\n", "\r").encode(), "lines end with CR"),
        (text.replace("\n", "\r\n").encode(), "lines end with CRLF"),
        (text.replace("e", "\x00", 1).encode(), "a NUL"),
        (text.replace(" ", "\u2028", 1).encode(), "a line separator"),
    ])  # fmt: skip


def _line(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    lines = content.decode("utf-8", errors="replace").split("\n")
    index = generator.randrange(len(lines))
    odd = generator.choice(["", "\t", "# id = 1", "-DOCSTART- -X- O O", "word", "a\tb\tc\td", "NA", '"', "[" * 50])
    if generator.random() < 0.5:
        lines[index : index + 1] = [odd]
        return "\n".join(lines).encode(), f"line {index + 1} is {odd!r}"
    lines.insert(index, lines[generator.randrange(len(lines))])
    return "\n".join(lines).encode(), f"another line before line {index + 1}"


def _table(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    rows = list(csv.reader(io.StringIO(content.decode("utf-8", errors="replace"))))
    if not rows:
        return content, "nothing"
    index = generator.randrange(len(rows)) if generator.random() < 0.7 else 0
    row = rows[index]
    odd = generator.choice(
        ["", "NA", "null", "01", "True", "1e5", "['a', 'b']", "a,b", 'a"b', "a\nb", "0", "Text", "\ufeff"]
    )
    if row and generator.random() < 0.7:
        column = generator.randrange(len(row))
        row[column], done = odd, f"row {index} column {column} is {odd!r}"
    elif row and generator.random() < 0.5:
        del row[generator.randrange(len(row))]
        done = f"row {index} lacks a cell"
    else:
        row.append(odd)
        done = f"row {index} has one more cell {odd!r}"
    stream = io.StringIO()
    csv.writer(stream, delimiter=generator.choice(",,,;\t"), lineterminator="\n").writerows(rows)
    return stream.getvalue().encode(), done


def _json(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    if generator.random() < 0.03:
        return DEEP.encode(), "5,000 brackets"
    value, done = _change_node(json.loads(content), generator)
    return json.dumps(value, ensure_ascii=generator.random() < 0.5).encode("utf-8", errors="replace"), done


def _json_lines(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    lines = content.split(b"\n")
    index = generator.choice([number for number, line in enumerate(lines) if line.strip()] or [0])
    if not lines[index].strip():
        return content, "nothing"
    lines[index], done = _json(lines[index], generator)
    return b"\n".join(lines), f"line {index + 1}: {done}"


def _yaml(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    if generator.random() < 0.05:
        return generator.choice([
            (DEEP.encode(), "5,000 brackets"),
            (ALIASES.encode(), "aliases of aliases"),
            (b"!!python/object/apply:os.system ['echo hello']\n" + content, "a Python tag"),
            (content + content, "all is there twice"),
        ])  # fmt: skip
    value, done = _change_node(yaml.safe_load(content), generator)
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode("utf-8", errors="replace"), done


def _change_node(value: Any, generator: random.Random) -> tuple[Any, str]:
    """Replace, remove, rename or double one node of a tree."""
    value = copy.deepcopy(value)
    paths = _paths(value)
    if not paths:
        return generator.choice(ODD_VALUES), "another value"
    *parents, key = generator.choice(paths)
    parent = value
    for step in parents:
        parent = parent[step]
    where, odd = "/".join(map(str, (*parents, key))), generator.choice(ODD_VALUES)
    way = generator.random()
    if way < 0.7:
        parent[key] = odd
        return value, f"{where} is {str(odd)[:40]!r}"
    if way < 0.85:
        del parent[key]
        return value, f"{where} is gone"
    if isinstance(parent, dict):
        parent[f"{key}s"] = parent.pop(key)
        return value, f"{where} is {key}s"
    parent.insert(0, parent[key])
    return value, f"{where} is there twice"


def _paths(value: Any) -> list[tuple[Any, ...]]:
    """List the path of every node below the root."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in entries for path in ((key,), *((key, *rest) for rest in _paths(inner)))]


def _tensors(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    tensors = safetensors.torch.load(content)
    if not tensors:
        return content, "nothing"
    name = generator.choice(sorted(tensors))
    tensor = tensors[name]
    changed = {
        "is gone": None,
        "times 1e19": tensor * 1e19,
        "NaN": torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor,
        "transposed": tensor.transpose(0, -1).contiguous() if tensor.dim() else tensor,
        "of whole numbers": tensor.to(torch.int32),
        "complex": tensor.to(torch.complex64),
        "float8": tensor.to(torch.float8_e4m3fn) if tensor.is_floating_point() else tensor,
        "without dimensions": torch.zeros((), dtype=tensor.dtype),
        "smaller": tensor[:1].clone() if tensor.dim() else tensor,
        "empty": tensor[:0].clone() if tensor.dim() else tensor,
    }
    done = generator.choice(list(changed))
    if changed[done] is None:
        del tensors[name]
    else:
        tensors[name] = changed[done]
    return safetensors.torch.save(tensors), f"{name} {done}"


_BY_SUFFIX = {
    ".json": [_json],
    ".jsonl": [_json_lines],
    ".yaml": [_yaml],
    ".csv": [_table],
    ".tsv": [_table, _line],
    ".txt": [_line],
    ".safetensors": [_tensors],
}
