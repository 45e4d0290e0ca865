"""Does the gate earn its place? A new task with few labelled rows: a fresh LoRA, or joint mixing over existing experts.

    python benchmarks/few_shot.py --base CHECKPOINT --data-root DATA --tasks banking77,atis,conll2003 --rows 10,50

alone: a new expert on its own. by text, by token: a new expert and a gate over it and the experts of the checkpoint,
which stay as they are; two experts are mixed. All see the same rows (so many a class; for tagging, so many
sentences with an entity of each type), as many other rows choose the best epoch, and the whole test split is scored.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

import torch
from few_rows import draw
from runs import Entry, Runs, mean_and_spread
from script import chosen, listed, numbers, run

import sparse_ft
from sparse_ft.checkpoint.manifest import read_config, read_manifest
from sparse_ft.tasks.spec import load_task

METHODS = {"alone": [], "by text": ["stage=joint"], "by token": ["stage=joint", "gate.type=token"]}


class Comparison:
    """The methods on the same rows.

    Args:
        base: Checkpoint with the existing experts.
        overrides: For all runs.
    """

    def __init__(self, base: Path, *, overrides: list[str]) -> None:
        self.base, self.overrides = base, overrides
        self.manifest, self.config = read_manifest(base), read_config(base / "config.yaml")
        self.sha256 = hashlib.sha256((base / "manifest.json").read_bytes()).hexdigest()

    def run(self, method: str, task: Path, *, seed: int, output: Path) -> dict[str, float]:
        alone = method == "alone"
        as_base = [f"data.max_length={self.config.data.max_length}", f"experts.pooling={self.manifest.pooling}"]
        result = sparse_ft.train(
            [str(task)],
            backbone=self.config.backbone if alone else None,
            from_checkpoint=None if alone else self.base,
            output=output,
            overrides=[*(as_base if alone else []), *self.overrides, *METHODS[method]],
            seed=seed,
            device="cpu",
        )
        (name,) = result.tasks
        score = result.scores[name][result.tasks[name].metric]
        return {"score": score}


def table(entries: list[Entry]) -> str:
    lines = ["| task | rows a class | method | seeds | score |", "|---|---:|---|---:|---:|"]
    keys = dict.fromkeys((entry["task"], entry["rows"], entry["method"]) for entry in entries)
    for task, rows, method in sorted(keys, key=lambda key: (key[0], key[1])):
        same = {"task": task, "rows": rows, "method": method}
        scores = [entry["score"] for entry in entries if same.items() <= entry.items()]
        lines.append(f"| {task} | {rows} | {method} | {len(scores)} | {mean_and_spread(scores)} |")
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
    methods = chosen(options.methods, METHODS, what="method")
    root, base = options.data_root.resolve(), options.base.resolve()
    comparison = Comparison(base, overrides=options.overrides)
    same = {
        "base": f"{base} {comparison.sha256[:12]}",
        "data": str(root),
        "overrides": options.overrides,
        "threads": options.threads,
    }
    runs, entries = Runs(options.results), []
    for seed in numbers(options.seeds):
        for task in listed(options.tasks):
            for rows in numbers(options.rows):
                with tempfile.TemporaryDirectory() as folder:
                    path = draw(load_task(task), root / task, rows=rows, seed=seed, folder=Path(folder))
                    for method in methods:
                        request = {"task": task, "rows": rows, "method": method, "seed": seed, **same}
                        if not runs.find(request):
                            output = Path(folder) / method.replace(" ", "-")
                            runs.add(request, comparison.run(method, path, seed=seed, output=output))
                        entries.append(runs.find(request)[-1])
    print(table(entries))


if __name__ == "__main__":
    run(main)
