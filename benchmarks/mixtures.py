"""Compare ways to serve several tasks with one backbone, on the same rows and epochs: scores and parameters.

    python benchmarks/mixtures.py --tasks sentiment,topic,intent,ner --seeds 13,14,15
    python benchmarks/mixtures.py --data-root DATA --tasks sst2,ag_news,clinc150,conll2003

full: a full fine-tune per task. expert: a LoRA per task, the task known; both in batches of 32 rows by the number
of tasks. The routes below it use the same experts. shared: one LoRA for all tasks. joint: experts and gate together, a
text or a token going through two experts; pool: the same with experts of no task. Every method sees each row
``train.epochs`` times, in about as many steps where the tasks are of one size. Parameters: those of experts, heads, and
the gate where it learns and is used. Each finished run is one line of ``--results``; what is there is not run again.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parameters import trained_numbers
from runs import Runs, mean_and_spread
from script import chosen, listed, numbers, run
from trainer_peers import run_trainer

import sparse_ft
from sparse_ft.config import load_config
from sparse_ft.errors import ConfigError
from sparse_ft.experts.model import SparseExpertModel

ROUTES = ("gate", "prototype", "arrow", "uniform", "random", "hash")
"""Of the experts that were trained alone."""


EQUAL = ["train.min_steps=0", "train.patience=0"]
"""So that no row is seen more often than others, and no method stops early."""


class Comparison:
    """One seed on some tasks.

    Args:
        tasks: Bundled names.
        data_root: Folder with a folder for each task; None takes the bundled samples.
        seed: Of everything.
        overrides: For all runs.
        folder: For checkpoints.
    """

    def __init__(
        self, tasks: list[str], *, data_root: Path | None, seed: int, overrides: list[str], folder: Path
    ) -> None:
        self.tasks, self.seed, self.folder = tasks, seed, folder
        self.overrides = overrides
        self.sources = {task: data_root / task for task in tasks} if data_root else None

    def full(self) -> dict[str, dict[str, Any]]:
        settings = load_config(overrides=self.overrides)
        sources = self.sources or dict.fromkeys(self.tasks)
        batch = 32 // len(self.tasks)  # as many rows of a task in a step as in a batch of all
        found = [
            run_trainer(
                "full",
                task,
                sources[task],
                self.seed,
                self.overrides,
                epochs=settings.train.epochs,
                backbone=settings.backbone,
                batch_size=batch,
            )
            for task in self.tasks
        ]
        scores = {task: entry["headline"] for task, entry in zip(self.tasks, found, strict=True)}
        seconds = sum(entry["seconds"] for entry in found)
        return {"full": {"scores": scores, "trained": sum(entry["trainable"] for entry in found), "seconds": seconds}}

    def expert(self) -> dict[str, dict[str, Any]]:
        batch = 32 // len(self.tasks)  # they are trained one after the other
        found = {"expert": self._run("expert", f"train.batch_size={batch}")}
        path = self.folder / "expert"
        for route in ROUTES:
            request, checkpoint = route, path
            if route == "prototype":
                request, checkpoint = "gate", self.folder / "prototype"
                sparse_ft.train(
                    stage="gate",
                    from_checkpoint=path,
                    output=checkpoint,
                    overrides=["gate.type=prototype"],
                    device="cpu",
                )
            result = sparse_ft.evaluate(checkpoint, route=request, device="cpu")
            found[f"expert, route {route}"] = {
                "scores": _headlines(checkpoint, result),
                "trained": trained_numbers(_model(path), gate=route == "gate"),
                "right": result.routing.accuracy,
            }
        return found

    def shared(self) -> dict[str, dict[str, Any]]:
        return {"shared": self._run("shared", "experts.pool=1")}

    def joint_sequence(self) -> dict[str, dict[str, Any]]:
        return {"joint, by text": self._run("joint_sequence", "stage=joint")}

    def joint_token(self) -> dict[str, dict[str, Any]]:
        return {"joint, by token": self._run("joint_token", "stage=joint", "gate.type=token")}

    def pool_token(self) -> dict[str, dict[str, Any]]:
        number = len(self.tasks)
        return {f"pool of {number}, by token": self._run("pool_token", f"experts.pool={number}", "gate.type=token")}

    def _run(self, name: str, *overrides: str) -> dict[str, Any]:
        started = time.perf_counter()
        result = sparse_ft.train(
            self.tasks,
            data=None if self.sources is None else {task: str(path) for task, path in self.sources.items()},
            output=self.folder / name,
            overrides=[*self.overrides, *overrides],
            seed=self.seed,
            device="cpu",
        )
        return {
            "seconds": time.perf_counter() - started,
            "scores": _headlines(result.path, result.evaluation),
            "trained": trained_numbers(_model(result.path), gate=name != "expert"),
        }


METHODS: dict[str, Callable[[Comparison], dict[str, dict[str, Any]]]] = {
    "expert": Comparison.expert,
    "shared": Comparison.shared,
    "joint_sequence": Comparison.joint_sequence,
    "joint_token": Comparison.joint_token,
    "pool_token": Comparison.pool_token,
    "full": Comparison.full,
}


def _model(checkpoint: Path) -> SparseExpertModel:
    return sparse_ft.load(checkpoint, device="cpu").checkpoint.model


def _headlines(checkpoint: Path, result: sparse_ft.Evaluation) -> dict[str, float]:
    """Return the score that each task is known by."""
    loaded = sparse_ft.load(checkpoint, device="cpu")
    return {task: entry.score.metrics[loaded.tasks[task].metric] for task, entry in result.tasks.items()}


def _table(entries: list[dict[str, Any]], tasks: list[str]) -> str:
    lines = [
        f"| method | {' | '.join(tasks)} | mean | right expert | trained parameters | seconds |",
        "|---|" + "---:|" * (len(tasks) + 4),
    ]
    for method in dict.fromkeys(entry["method"] for entry in entries):
        rows = [entry for entry in entries if entry["method"] == method]
        cells = [mean_and_spread([row["scores"][task] for row in rows]) for task in tasks]
        cells.append(mean_and_spread([statistics.mean(row["scores"].values()) for row in rows]))
        right = [row["right"] for row in rows if "right" in row]
        cells.append(f"{statistics.mean(right):.3f}" if right else "")
        cells.append(f"{rows[0]['trained']:,}")
        seconds = [row["seconds"] for row in rows if "seconds" in row]
        cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, help="folder with sst2/, conll2003/, …; default: the bundled samples")
    parser.add_argument("--tasks", default="sentiment,topic,intent,ner")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="13,14,15")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="section.key=value, for all runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path("mixtures.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tasks, methods = listed(options.tasks), chosen(options.methods, METHODS, what="method")
    if len(tasks) < 2:
        raise ConfigError(f"There is nothing to route with one task ({options.tasks}). Name two at least.")
    if any(override.startswith("train.batch_size=") for override in options.overrides):
        raise ConfigError("train.batch_size cannot be set: it is 32 rows by what a method trains at once.")
    root = None if options.data_root is None else options.data_root.resolve()
    overrides = [*EQUAL, *options.overrides]
    same = {"tasks": tasks, "data": str(root), "overrides": overrides, "threads": options.threads}
    runs, entries = Runs(options.results), []
    for seed in numbers(options.seeds):
        for method in methods:
            request = {"run": method, "seed": seed, **same}
            if not runs.find(request):
                with tempfile.TemporaryDirectory() as folder:
                    comparison = Comparison(tasks, data_root=root, seed=seed, overrides=overrides, folder=Path(folder))
                    for row, found in METHODS[method](comparison).items():
                        runs.add(request, {"method": row, **found})
            entries.extend({entry["method"]: entry for entry in runs.find(request)}.values())
    print(_table(entries, tasks))


if __name__ == "__main__":
    run(main)
