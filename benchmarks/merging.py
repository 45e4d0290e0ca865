"""What does merging cost? Every method on four tasks, and on two experts of one task, against the single experts.

    python benchmarks/merging.py --density 0.5
    python benchmarks/merging.py --checkpoint runs/all --density 0.5

Four tasks: the bundled samples, one expert each, default settings. One task: two experts, each trained on one half of
the rows of the bundled sentiment sample. Weights are equal; those of methods that add up have a sum of 1, or are 1
each. Test rows; nothing was chosen on them. Nothing random but the training and what DARE and DELLA drop (--seeds).
"""

import argparse
import tempfile
from pathlib import Path

from script import numbers, run

from sparse_ft.checkpoint.checkpoint import Checkpoint, load_checkpoint
from sparse_ft.evaluation.evaluate import evaluate_task
from sparse_ft.merging.add import add_from
from sparse_ft.merging.merged_expert import merge_experts
from sparse_ft.merging.merged_tasks import group_tasks, install, part_tasks
from sparse_ft.merging.methods import MERGE_METHODS
from sparse_ft.merging.settings import MergeSettings, merge_settings
from sparse_ft.prediction.routes import Route
from sparse_ft.tasks.spec import TaskSpec, load_task
from sparse_ft.training.train import train

TASKS = ["sentiment", "topic", "intent", "ner"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="of the four tasks; trained here if not given")
    parser.add_argument("--halves", type=Path, help="folder with the checkpoints 0 and 1; trained here if not given")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--seeds", default="13,14,15", help="of what is dropped at random")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="for the training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint
        if path is None:
            path = train(TASKS, output=Path(folder) / "four", overrides=options.overrides, device="cpu").path
        compare(load_checkpoint(path), options)
        halves = options.halves or train_halves(Path(folder), options.overrides)
        both = load_checkpoint(halves / "0")
        add_from(both, halves / "1", as_name="other")
        compare(both, options)


def train_halves(folder: Path, overrides: list[str]) -> Path:
    """Train two experts on the even and the odd rows of the sentiment sample; same validation and test rows."""
    spec = load_task("sentiment")
    header, *lines = Path(spec.files.root, "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    for half in (0, 1):
        rows = folder / f"rows{half}"
        rows.mkdir(parents=True)
        for split in ("validation.tsv", "test.tsv"):
            (rows / split).write_bytes(Path(spec.files.root, split).read_bytes())
        (rows / "train.tsv").write_text(header + "".join(lines[half::2]), encoding="utf-8")
        train(["sentiment"], data=rows, output=folder / str(half), overrides=overrides, device="cpu")
    return folder


def compare(checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Print a table of methods."""
    model = checkpoint.model
    experts = [model.experts.get(name) for name in model.experts.names]
    parts = part_tasks(checkpoint, called={})
    tasks = group_tasks(parts, heads="average")
    print(f"| method | rank | error | {' | '.join(part.name for part in parts)} | mean |")
    print("|---|---:|---:|" + "---:|" * (len(parts) + 1))
    show("single experts", "", "", [score(checkpoint, part.spec, part.source) for part in parts])
    wanted = {part.name: (task.spec_of(part), part.source) for task in tasks for part in task.parts}
    for label, settings in variants(len(experts), options):
        merged = merge_experts(experts, settings)
        weights = dict(zip([expert.name for expert in experts], settings.weights, strict=True))
        install(model, merged.expert, tasks, weights=weights, heads="average")
        scores = [score(checkpoint, *wanted[part.name]) for part in parts]
        show(label, str(max(merged.expert.ranks.values())), f"{merged.error:.3f}", scores)


def variants(number: int, options: argparse.Namespace) -> list[tuple[str, MergeSettings]]:
    results = []
    for method, row in MERGE_METHODS.items():
        if row.most is not None and number > row.most:
            continue
        extra = {"density": options.density} if "density" in row.heeds else {}
        extra |= {"rank": 8} if method == "svd" else {}
        for seed in numbers(options.seeds) if "seed" in row.heeds else [13]:
            label = f"{method}, seed {seed}" if "seed" in row.heeds else method
            label += ", rank 8" if method == "svd" else ""
            values = {"method": method, "seed": seed if "seed" in row.heeds else None, **extra}
            results.append((label, merge_settings(values).for_experts(number)))
            if not row.averages and method not in ("cat", "svd"):
                added = merge_settings({**values, "weights": [1.0] * number}).for_experts(number)
                results.append((f"{label}, weights 1", added))
    return results


def score(checkpoint: Checkpoint, spec: TaskSpec, source: str | None) -> float:
    encoder = checkpoint.encoder
    route = Route("task", checkpoint.model)
    results = evaluate_task(checkpoint.model, spec, split="test", source=source, encoder=encoder, route=route)
    return results.report.score.metrics[spec.metric]


def show(label: str, rank: str, error: str, scores: list[float]) -> None:
    mean = sum(scores) / len(scores)
    print(f"| {label} | {rank} | {error} | {' | '.join(f'{value:.3f}' for value in [*scores, mean])} |", flush=True)


if __name__ == "__main__":
    run(main)
