"""A task with few labelled rows a class, drawn from a public one."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import label_names, read
from sparse_ft.tasks.spec import TaskSpec


def draw(spec: TaskSpec, source: Path, *, rows: int, seed: int, folder: Path, in_scope: bool = False) -> Path:
    """Write a task with so many training rows a class and return its task file; for tagging, sentences with each type.

    As many other rows of the training split become the validation split; test stays as it is. ``in_scope`` leaves out
    of all three what belongs to no class.
    """
    splits = read(spec, data=source)
    answers = "tags" if find_kind(spec.kind).level == "word" else "label"
    outside = spec.out_of_scope if in_scope else None
    kept = {
        split: [row for row in splits[split].to_list() if outside is None or row["label"] != outside]
        for split in ("train", "test")
    }
    train = kept["train"]
    random.Random(seed).shuffle(train)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": kept["test"]}
    for split in ("train", "validation"):
        counts: dict[str, int] = {}
        left = []
        for row in train:
            classes = {tag[2:] for tag in row["tags"] if tag != "O"} if answers == "tags" else {row["label"]}
            if any(counts.get(name, 0) < rows for name in classes):
                splits[split].append(row)
                counts.update({name: counts.get(name, 0) + 1 for name in classes})
            else:
                left.append(row)
        train = left
    columns = {name: name for name in spec.columns if name in ("text", "text_pair", "tokens")} | {answers: answers}
    for split, chosen in splits.items():
        lines = [json.dumps({name: row[name] for name in columns}, ensure_ascii=False) for row in chosen]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {
        "name": f"new_{spec.name}",
        "kind": spec.kind,
        "language": spec.language,
        "files": {"format": "jsonl", "root": ".", **{split: f"{split}.jsonl" for split in splits}},
        "columns": columns,
        "labels": [label for label in label_names(spec, splits["train"]) if outside is None or label != outside],
        "metric": spec.metric,
        **({"label_scheme": "iob2"} if answers == "tags" else {}),
        **({"out_of_scope": spec.out_of_scope} if spec.out_of_scope and not in_scope else {}),
    }
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
