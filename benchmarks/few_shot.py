"""Does the gate earn its place? A new task with few labelled rows: a fresh LoRA, or joint mixing over existing experts.

    python benchmarks/few_shot.py --base CHECKPOINT --data-root DATA --tasks banking77,atis,conll2003 --rows 10,50

alone: a new expert on its own. by text, by token: a new expert and a gate over it and the experts of the checkpoint,
which stay as they are; two experts are mixed. All see the same rows (so many a class; for tagging, so many entities a
type), as many other rows choose the best epoch, and the whole test split is scored.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import sparse_ft.training
from sparse_ft.kinds import find_kind
from sparse_ft.readers import label_names, read
from sparse_ft.tasks import TaskSpec, load_task

METHODS = {"alone": [], "by text": ["stage=joint"], "by token": ["stage=joint", "gate.type=token"]}


def draw(spec: TaskSpec, source: Path, *, rows: int, seed: int, folder: Path) -> Path:
    """Write a task with few training rows; return its task file."""
    found = read(spec, data=source)
    answers = "tags" if find_kind(spec.kind).level == "word" else "label"
    train = found["train"].to_list()
    random.Random(seed).shuffle(train)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": found["test"].to_list()}
    for split in ("train", "validation"):
        counts: dict[str, int] = {}
        for row in list(train):
            classes = {tag[2:] for tag in row["tags"] if tag != "O"} if answers == "tags" else {row["label"]}
            if any(counts.get(name, 0) < rows for name in classes):
                splits[split].append(row)
                train.remove(row)
                counts.update({name: counts.get(name, 0) + 1 for name in classes})
    columns = {name: name for name in spec.columns if name in ("text", "text_pair", "tokens")} | {answers: answers}
    for split, kept in splits.items():
        lines = [json.dumps({name: row[name] for name in columns}, ensure_ascii=False) for row in kept]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {
        "name": f"new_{spec.name}",
        "kind": spec.kind,
        "language": spec.language,
        "files": {"format": "jsonl", "root": ".", **{split: f"{split}.jsonl" for split in splits}},
        "columns": columns,
        "labels": label_names(spec, found["train"]),
        "metric": spec.metric,
        **({"label_scheme": "iob2"} if answers == "tags" else {}),
    }
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def run(method: str, task: Path, base: Path, *, seed: int, overrides: list[str], output: Path) -> dict[str, float]:
    started = time.perf_counter()
    result = sparse_ft.training.train(
        [str(task)],
        from_checkpoint=None if method == "alone" else base,
        output=output,
        overrides=[*overrides, *METHODS[method]],
        seed=seed,
        device="cpu",
    )
    (name,) = result.tasks
    score = result.scores[name][result.tasks[name].metric]
    return {"score": score, "seconds": time.perf_counter() - started}


def table(entries: list[dict[str, Any]]) -> str:
    lines = ["| task | rows a class | method | seeds | score |", "|---|---:|---|---:|---:|"]
    keys = dict.fromkeys((entry["task"], entry["rows"], entry["method"]) for entry in entries)
    for task, rows, method in sorted(keys, key=lambda key: (key[0], key[1])):
        scores = [
            entry["score"]
            for entry in entries
            if (entry["task"], entry["rows"], entry["method"]) == (task, rows, method)
        ]
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        lines.append(f"| {task} | {rows} | {method} | {len(scores)} | {statistics.mean(scores):.3f}{spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="checkpoint with the existing experts")
    parser.add_argument("--data-root", type=Path, required=True, help="folder with banking77/, atis/, …")
    parser.add_argument("--tasks", default="banking77,atis,conll2003")
    parser.add_argument("--rows", default="10,50")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="13,14,15,16,17")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="section.key=value, for all runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path("few_shot.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    entries: list[dict[str, Any]] = []
    if options.results.exists():
        entries = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    done = {(entry["task"], entry["rows"], entry["method"], entry["seed"]) for entry in entries}
    for seed in [int(seed) for seed in options.seeds.split(",")]:
        for task in options.tasks.split(","):
            for rows in [int(rows) for rows in options.rows.split(",")]:
                with tempfile.TemporaryDirectory() as folder:
                    path = draw(load_task(task), options.data_root / task, rows=rows, seed=seed, folder=Path(folder))
                    for method in options.methods.split(","):
                        if (task, rows, method, seed) in done:
                            continue
                        output = Path(folder) / method.replace(" ", "-")
                        found = run(method, path, options.base, seed=seed, overrides=options.overrides, output=output)
                        entries.append({"task": task, "rows": rows, "method": method, "seed": seed, **found})
                        with options.results.open("a", encoding="utf-8") as stream:
                            stream.write(json.dumps(entries[-1]) + "\n")
    print(table(entries))


if __name__ == "__main__":
    main()
