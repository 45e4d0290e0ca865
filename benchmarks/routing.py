"""Does the gate send a text to the right expert without being told the task, and does it know what it does not know?

    python benchmarks/routing.py --data-root DATA --tasks sst2,ag_news,clinc150,conll2003 --blocks 0,3,5

The gate reads what the bare backbone hands to a block and leaves the experts alone, so they need no training here: a
model with fresh ones routes like a model with trained ones. Fitted on training rows (``gate.rows`` a task), scored on
all test rows. Foreign texts: Chinese headlines (clue/tnews, if it is there), lines of source code (of this package),
random characters. The threshold of 0.02 is not tuned on anything that is scored: it asks to turn away 2 % of the texts
that belong here.
"""

import argparse
import random
import string
import time
from pathlib import Path

import torch

import sparse_ft
from sparse_ft.backbone import load_backbone
from sparse_ft.config import load_config
from sparse_ft.encoding import Encoder
from sparse_ft.gate_training import fit_gate
from sparse_ft.inference import pooled_entering
from sparse_ft.kinds import find_kind
from sparse_ft.model import SparseExpertModel
from sparse_ft.readers import label_names, read
from sparse_ft.tasks import load_task

THRESHOLD = 0.02


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
    found = {"source code": generator.sample(code, min(number, len(code))), "random characters": noise}
    if (data_root / "clue").is_dir():
        rows = read(load_task("clue/tnews"), data=data_root / "clue/tnews", splits=["validation"])["validation"]
        found["Chinese"] = generator.sample(list(rows["text"]), number)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--tasks", default="sst2,ag_news,clinc150,conll2003")
    parser.add_argument("--blocks", default="0,3,5", help="whose input the gate reads")
    parser.add_argument("--rows", default="2000", help="training rows a task")
    parser.add_argument("--gates", default="sequence,prototype")
    parser.add_argument("--seeds", default="13,14,15")
    parser.add_argument("--foreign", type=int, default=1000, help="foreign texts of each sort")
    options = parser.parse_args()
    names = options.tasks.split(",")
    for block in map(int, options.blocks.split(",")):
        backbone = load_backbone("minilm")
        encoder = Encoder(backbone, max_length=256)
        model = SparseExpertModel(backbone).eval()
        modules = backbone.select_linears(first_block=block)
        train, test = {}, {}
        for name in names:
            spec = load_task(name)
            found = read(spec, data=options.data_root / name, splits=["train", "test"])
            kind, labels = find_kind(spec.kind), label_names(spec, found["train"])
            for split, into in (("train", train), ("test", test)):
                into[name] = kind.encode(found[split].to_dict(), encoder=encoder, labels=labels, language=spec.language)
            model.experts.create(name, modules=modules, rank=1, alpha=1.0, seed=0)
        started = time.perf_counter()
        features = {name: pooled_entering(model, examples) for name, examples in test.items()}
        foreign = {
            sort: pooled_entering(model, encoder.texts(texts))
            for sort, texts in foreign_texts(options.data_root, options.foreign, 0).items()
        }
        print(f"block {block}: features in {time.perf_counter() - started:.0f} s", flush=True)
        for gate_type in options.gates.split(","):
            for seed in map(int, options.seeds.split(",")):
                run = load_config(overrides=[f"gate.type={gate_type}", f"gate.rows={options.rows}"])
                started = time.perf_counter()
                gate = fit_gate(model, train, settings=run.gate, seed=seed)
                seconds = time.perf_counter() - started
                with torch.no_grad():
                    routed = {name: gate.decide(rows) for name, rows in features.items()}
                    strange = {sort: gate.decide(rows).confidence for sort, rows in foreign.items()}
                right = {
                    name: float((routing.logits.argmax(-1) == place).float().mean())
                    for place, (name, routing) in enumerate(routed.items())
                }
                kept = {
                    name: float((routing.confidence >= THRESHOLD).float().mean()) for name, routing in routed.items()
                }
                away = {sort: float((confidence < THRESHOLD).float().mean()) for sort, confidence in strange.items()}
                shown = [
                    f"right {sum(right.values()) / len(right):.4f} " + show(right),
                    "kept " + show(kept),
                    "turned away " + show(away),
                    f"{seconds:.1f} s",
                ]
                print(f"block {block} {gate_type} seed {seed}: " + "; ".join(shown), flush=True)


def show(values: dict[str, float]) -> str:
    return "(" + ", ".join(f"{name} {value:.4f}" for name, value in values.items()) + ")"


if __name__ == "__main__":
    main()
