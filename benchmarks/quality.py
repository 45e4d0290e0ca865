"""Score our experts against a full fine-tune of the same backbone, on public data.

    python benchmarks/quality.py --data-root DATA --tasks conll2003,sst2 --methods expert,full --seeds 13,14,15

Both methods read the same rows through the same tokens and are scored by the same code; the validation split chooses
the best epoch, and test is scored once per run. Each finished run is one line of ``--results``; what is there already
is not run again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from full_fine_tune import RECIPES, run_full

import sparse_ft.training


def run_expert(task: str, source: Path, seed: int, overrides: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = sparse_ft.training.train(
            [task], data=source, output=Path(folder) / "run", seed=seed, overrides=overrides, device="cpu"
        )
        seconds = time.perf_counter() - started
        files = [
            *(Path(folder) / "run" / "experts").rglob("*.safetensors"),
            *(Path(folder) / "run" / "heads").iterdir(),
        ]
        entry = result.evaluation.tasks[task]
        return {
            "metrics": entry.score.metrics,
            "token_report": entry.score.token_report,
            "validation": max(epoch["validation"][task] for epoch in result.history),
            "epochs": len(result.history),
            "seconds": seconds,
            "tokens_per_second": result.tokens_per_second,
            "trainable": sum(file.stat().st_size for file in files) // 4,
        }


METHODS = {"expert": run_expert, "full": run_full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder with conll2003/, sst2/, …")
    parser.add_argument("--tasks", default=",".join(RECIPES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="13,14,15")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        help="section.key=value; the full fine-tune heeds data.train_limit",
    )
    parser.add_argument("--note", default="", help="kept with each result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = set()
    if options.results.exists():
        for line in options.results.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            done.add((entry["task"], entry["method"], entry["seed"], entry["note"]))
    for seed in [int(seed) for seed in options.seeds.split(",")]:
        for task in options.tasks.split(","):
            for method in options.methods.split(","):
                if (task, method, seed, options.note) in done:
                    continue
                result = METHODS[method](task, options.data_root / task, seed, options.overrides)
                entry = {"task": task, "method": method, "seed": seed, "note": options.note, **result}
                with options.results.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(entry) + "\n")
                shown = {key: round(value, 4) for key, value in entry["metrics"].items()}
                print(
                    task,
                    method,
                    seed,
                    options.note,
                    f"validation {entry['validation']:.4f}",
                    shown,
                    f"{entry['seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
