"""Does the gate earn its place? A new task with few labelled rows: a fresh LoRA, or joint mixing over existing experts.

    python benchmarks/few_shot.py --base CHECKPOINT --data-root DATA --tasks banking77,atis,conll2003 --rows 10,50

alone: a new expert on its own. by text, by token: a new expert and a gate over it and the experts of the checkpoint,
which stay as they are; two experts are mixed. All see the same rows (so many a class; for tagging, so many
sentences with an entity of each type), as many other rows choose the best epoch, and the whole test split is scored.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from few_rows import draw

import sparse_ft.training
from sparse_ft.tasks import load_task

METHODS = {"alone": [], "by text": ["stage=joint"], "by token": ["stage=joint", "gate.type=token"]}


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
