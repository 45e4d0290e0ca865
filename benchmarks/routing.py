"""Does the gate send a text to the right expert without being told the task, and does it know what it does not know?

    python benchmarks/routing.py --data-root DATA

The gate reads what the bare backbone hands to its blocks and leaves the experts alone, so it needs none here: a model
with fresh ones routes like a model with trained ones. Fitted on training rows (``gate.rows`` a task), scored on all
test rows. Foreign texts: Chinese headlines (clue/tnews, validation), lines of source code (of this package), random
characters. Two thresholds, neither tuned on anything that is scored: 0.02, and the one that keeps 98 % of the
validation rows, on the mean over the tasks.
"""

import argparse
import itertools
import random
import string
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from script import chosen, listed, numbers, run
from torch import Tensor

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.config import GateConfig
from sparse_ft.experts.inference import mean_states
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import label_names, read
from sparse_ft.tasks.spec import load_task
from sparse_ft.training.fit_gate import fit_on_means

THRESHOLD = 0.02


class Seen(NamedTuple):
    """What a gate sees of texts."""

    means: Tensor
    """[rows, blocks, hidden]."""
    tokens: list[list[int]]


def foreign_texts(data_root: Path, number: int, seed: int) -> dict[str, list[str]]:
    generator = random.Random(seed)
    code = [
        line.strip()
        for file in sorted(Path(sparse_ft.__file__).parent.rglob("*.py"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("    ") and len(line.strip()) > 20 and '"' not in line
    ]
    letters = string.ascii_letters + string.digits + "    "
    noise = ["".join(generator.choices(letters, k=generator.randint(10, 80))) for _ in range(number)]
    results = {"source code": generator.sample(code, min(number, len(code))), "random characters": noise}
    for folder in (data_root / "clue/tnews", data_root / "tnews"):
        if not folder.is_dir():
            continue
        rows = read(load_task("clue/tnews"), data=folder, splits=["validation"])["validation"]
        results["Chinese"] = generator.sample(list(rows["text"]), number)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--tasks", default="sst2,ag_news,clinc150,conll2003")
    parser.add_argument("--block", type=int, default=3, help="highest block whose input the gate reads")
    parser.add_argument("--rows", default="2000,10000", help="training rows a task")
    parser.add_argument("--gates", default="sequence,prototype")
    parser.add_argument("--seeds", default="13,14,15")
    parser.add_argument("--foreign", type=int, default=1000, help="foreign texts of each sort")
    options = parser.parse_args()
    names = listed(options.tasks)
    backbone = load_backbone("minilm")
    encoder = Encoder(backbone, max_length=256)
    model = SparseExpertModel(backbone).eval()

    def seen(examples: Sequence[Example]) -> Seen:
        means = mean_states(model, examples, block=options.block)
        return Seen(means, [example.input_ids for example in examples])

    started = time.perf_counter()
    splits: dict[str, dict[str, Seen]] = {"train": {}, "validation": {}, "test": {}}
    for name in names:
        spec = load_task(name)
        results = read(spec, data=options.data_root / name, splits=list(splits))
        kind, labels = find_kind(spec.kind), label_names(spec, results["train"])
        for split, into in splits.items():
            columns = results[split].to_dict()
            into[name] = seen(kind.encode(columns, encoder=encoder, labels=labels, language=spec.language))
    foreign = {
        sort: seen(encoder.texts(texts)) for sort, texts in foreign_texts(options.data_root, options.foreign, 0).items()
    }
    print(f"features in {time.perf_counter() - started:.0f} s", flush=True)
    for gate_type, rows, seed in itertools.product(
        chosen(options.gates, ("sequence", "prototype"), what="gate"), numbers(options.rows), numbers(options.seeds)
    ):
        settings = GateConfig(type=gate_type, rows=rows)
        drawn = {name: drawn_rows(splits["train"][name], rows, f"{seed}/{name}") for name in names}
        started = time.perf_counter()
        gate = fit_on_means(
            {name: part.means for name, part in drawn.items()},
            {name: part.tokens for name, part in drawn.items()},
            settings=settings,
            seed=seed,
        )
        seconds = time.perf_counter() - started
        test, validation, strange = (
            {name: gate.decide(part.means, part.tokens) for name, part in parts.items()}
            for parts in (splits["test"], splits["validation"], foreign)
        )
        right = {
            name: float((routing.logits.argmax(-1) == index).float().mean())
            for index, (name, routing) in enumerate(test.items())
        }
        every = sum(right[name] * len(splits["test"][name].tokens) for name in names)
        every /= sum(len(part.tokens) for part in splits["test"].values())
        print(f"{gate_type} {rows} rows seed {seed}, {seconds:.0f} s: right {show(right)}, of all rows {every:.4f}")
        lenient = max(
            share / 1000
            for share in range(101)
            if sum(kept(validation, share / 1000).values()) >= 0.98 * len(validation)
        )
        for threshold in (THRESHOLD, lenient):
            away = {sort: 1 - value for sort, value in kept(strange, threshold).items()}
            print(f"    at {threshold:.3f}: kept {show(kept(test, threshold))}; turned away {show(away)}", flush=True)


def drawn_rows(seen: Seen, number: int, key: str) -> Seen:
    indices = random.Random(key).sample(range(len(seen.tokens)), min(number, len(seen.tokens)))
    return Seen(seen.means[indices], [seen.tokens[index] for index in indices])


def kept(routings: Mapping[str, Routing], threshold: float) -> dict[str, float]:
    """Say which share of each set is familiar enough."""
    return {name: float((routing.confidence >= threshold).float().mean()) for name, routing in routings.items()}


def show(values: dict[str, float]) -> str:
    mean = sum(values.values()) / len(values)
    return f"{mean:.4f} (" + ", ".join(f"{name} {value:.4f}" for name, value in values.items()) + ")"


if __name__ == "__main__":
    run(main)
