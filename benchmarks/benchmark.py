"""Train, score and compare methods on public data: one table, and a plot of score against what it took.

    python benchmarks/benchmark.py conll2003 --data-root DATA --seeds 13,14,15 --methods expert,full
    python benchmarks/benchmark.py english4 --data-root DATA --methods mixture,full --append benchmarks/results.md
    python benchmarks/benchmark.py fewshot --data-root DATA --seeds 13,14,15,16,17
    python benchmarks/benchmark.py sst2,banking77 --data-root DATA

Methods: expert (one of ours a task), mixture (one of our checkpoints for all tasks, each answered by its own expert),
and those of trainer_peers.py: full, bitfit, head, peft. All read the same rows through the same tokens and are scored
by the same code; the validation split chooses the best epoch, and test is scored once per run. fewshot: 10 rows a
class. Each finished run is one line of ``--results``; what is there already is not run again. Seconds are those of the
whole run, validation included.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from few_rows import draw
from trainer_peers import RATES, run_trainer

import sparse_ft.training
from sparse_ft.tasks import load_task

SUITES = {
    "conll2003": ["conll2003"],
    "english4": ["sst2", "ag_news", "clinc150", "conll2003"],
    "fewshot": ["banking77", "clinc150"],
}
METHODS = ["expert", "mixture", *RATES, "peft"]
ROWS, EPOCHS = 10, 30
"""Of ``fewshot``: training rows a class, and epochs of the peers; ours repeats few rows by itself (train.min_steps)."""


def run_ours(
    tasks: list[str],
    sources: dict[str, Path | None],
    *,
    seed: int,
    overrides: list[str],
    backbone: str | None,
    keep: Path | None,
) -> list[dict[str, Any]]:
    """Train the tasks into one checkpoint, which stays under ``keep``; return an entry for each."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        named = {load_task(task).name: str(source) for task, source in sources.items() if source is not None}
        result = sparse_ft.training.train(
            tasks,
            data=named or None,
            backbone=backbone,
            output=(keep or Path(folder)) / f"{'+'.join(Path(task).stem for task in tasks)}-{seed}",
            seed=seed,
            overrides=overrides,
            device="cpu",
        )
        seconds = time.perf_counter() - started
        entries = []
        for name, spec in result.tasks.items():
            files = [
                *(result.path / "experts" / name).glob("*.safetensors"),
                *(result.path / "heads").glob(f"{name}.*"),
            ]
            score = result.evaluation.tasks[name].score
            entries.append({
                "metrics": score.metrics,
                "headline": score.metrics[spec.metric],
                "token_report": score.token_report,
                "validation": max(epoch["validation"][name] for epoch in result.history),
                "epochs": len(result.history),
                "seconds": seconds / len(tasks),
                "tokens_per_second": result.tokens_per_second,
                "trainable": sum(file.stat().st_size for file in files) // 4,
            })  # fmt: skip
        return entries


def run_method(
    method: str,
    tasks: list[str],
    *,
    data_root: Path,
    seed: int,
    overrides: list[str],
    few: bool,
    backbone: str | None = None,
    keep: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Return an entry a task."""
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, Path | None] = {task: data_root / task for task in tasks}
        if few:  # the new task file knows its rows
            drawn = {}
            for task in tasks:
                (Path(folder) / task).mkdir()
                path = draw(load_task(task), data_root / task, rows=ROWS, seed=seed, folder=Path(folder) / task)
                drawn[str(path)] = None
            sources = drawn
        asked = list(sources)
        if method in ("mixture", "expert"):
            found = run_ours(asked, sources, seed=seed, overrides=overrides, backbone=backbone, keep=keep)
        else:
            epochs = EPOCHS if few else None
            found = [run_trainer(method, name, sources[name], seed, overrides, epochs=epochs) for name in asked]
        return dict(zip(tasks, found, strict=True))


def table(entries: list[dict[str, Any]]) -> str:
    lines = [
        "| task | method | seeds | validation | test | spread | trained parameters | seconds | tokens per second |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (task, method), rows in _groups(entries).items():
        test = [row["headline"] for row in rows]
        cells = [
            task,
            method,
            ", ".join(str(row["seed"]) for row in rows),
            f"{statistics.mean(row['validation'] for row in rows):.4f}",
            f"{statistics.mean(test):.4f}",
            f"{statistics.stdev(test):.4f}" if len(test) > 1 else "",
            f"{rows[0]['trainable']:,}",
            f"{statistics.mean(row['seconds'] for row in rows):,.0f}",
            f"{statistics.mean(row['tokens_per_second'] for row in rows):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _groups(entries: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: entry["seed"]):
        groups.setdefault((entry["task"], entry["method"]), []).append(entry)
    return dict(sorted(groups.items()))


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Draw the score of each task and method against trained parameters and seconds, a point a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    for (task, method), rows in _groups(entries).items():
        style = {"color": f"C{methods.index(method)}", "marker": "os^Dvp*X"[tasks.index(task) % 8], "alpha": 0.8}
        score = [row["headline"] for row in rows]
        for axes, key in ((left, "trainable"), (right, "seconds")):
            axes.scatter([row[key] for row in rows], score, label=f"{task}, {method}", **style)
    for axes, name in ((left, "trained parameters"), (right, "seconds")):
        axes.set_xlabel(name)
        low, high = axes.get_xlim()
        if high > 10 * max(low, 1):
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    left.set_ylabel("test score")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def about() -> str:
    """Name the machine, the versions and the commit."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return f"{cpu}; Python {platform.python_version()}, {versions}; commit {commit}"


def finished(path: Path) -> list[dict[str, Any]]:
    """Read the runs that are there already."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", help=f"{', '.join(SUITES)}, or names of tasks separated by commas")
    parser.add_argument("--data-root", type=Path, required=True, help="folder with conll2003/, sst2/, …")
    parser.add_argument("--methods", default="expert,full", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", default="13,14,15")
    parser.add_argument("--backbone", help="of expert and mixture; the peers take the packaged MiniLM")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        help="section.key=value, for ours; the peers heed data.train_limit",
    )
    parser.add_argument("--note", default="", help="kept with each result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path("benchmark.jsonl"))
    parser.add_argument("--keep", type=Path, help="folder where the checkpoints of expert and mixture stay")
    parser.add_argument("--plot", type=Path, help="PNG of score against parameters and seconds")
    parser.add_argument("--append", type=Path, help="Markdown file that gets the table, e.g. benchmarks/results.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    few = options.suite == "fewshot"
    tasks = SUITES.get(options.suite) or options.suite.split(",")
    methods = options.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; there are {', '.join(METHODS)}")
    note = f"{options.note}{' few rows' if few else ''}".strip()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for seed in seeds:
        for method in methods:
            for group in [tasks] if method == "mixture" else [[task] for task in tasks]:
                done = {
                    (entry["task"], entry["method"], entry["seed"], entry["note"])
                    for entry in finished(options.results)
                }
                if all((task, method, seed, note) in done for task in group):
                    continue
                found = run_method(
                    method,
                    group,
                    data_root=options.data_root,
                    seed=seed,
                    overrides=options.overrides,
                    few=few,
                    backbone=options.backbone,
                    keep=options.keep,
                )
                with options.results.open("a", encoding="utf-8") as stream:
                    for task, result in found.items():
                        entry = {"task": task, "method": method, "seed": seed, "note": note, **result}
                        stream.write(json.dumps(entry) + "\n")
                        shown = f"{task} {method} {seed} {note}: validation {entry['validation']:.4f}"
                        print(f"{shown}, test {entry['headline']:.4f}, {entry['seconds']:.0f} s", flush=True)
    wanted = [
        entry
        for entry in finished(options.results)
        if entry["task"] in tasks and entry["method"] in methods and entry["seed"] in seeds and entry["note"] == note
    ]
    print(table(wanted))
    if options.plot:
        plot(wanted, options.plot)
    if options.append:
        command = f"`benchmarks/benchmark.py {options.suite} --methods {options.methods} --seeds {options.seeds}`"
        section = f"\n## {options.suite} {note}\n\n{command}, {about()}\n\n{table(wanted)}\n"
        with options.append.open("a", encoding="utf-8") as stream:
            stream.write(section)


if __name__ == "__main__":
    main()
