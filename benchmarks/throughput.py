"""Training throughput on CoNLL-2003: `sparse-ft` with its defaults against PEFT with Trainer's defaults, side by side.

    python benchmarks/throughput.py --data-root DATA

Both train on the same sentences for the same epochs from the same backbone; the sides take turns, round by round.
Counted are real tokens (no padding) per second of the whole training call, without reading data and without validation.
PEFT: LoRA of rank 8 on query and value (its default for BERT), batch 8, random order, padding to the longest row of a
batch, BERT's own dropout on, fp32: what a user gets who changes nothing. Ours switches that dropout off
(``train.backbone_dropout``) and takes bf16 where the hardware has it. F1 of both after whole runs: ``benchmark.py
conll2003 --methods expert,peft``. The share of the peak is that of a large matrix product in the same precision, of
which a step needs two for each frozen weight (forward, and backward to the input).
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from script import run
from trainer_peers import Classifier

from sparse_ft.backbone.backbone import load_backbone, set_training_attention
from sparse_ft.backbone.devices import find_device, find_dtype
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.config import load_config
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.tasks.encoded_rows import encode_rows
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import label_names, read
from sparse_ft.tasks.spec import load_task
from sparse_ft.training.loop import fit
from sparse_ft.training.new_experts import add_tasks
from sparse_ft.training.training_task import TrainingTask


def time_peft(spec, examples, validation, *, epochs, seed, device):
    torch.manual_seed(seed)
    classifier = Classifier(spec, load_backbone("minilm"), method="peft")
    settings = {"num_train_epochs": epochs}
    return classifier.train(examples, validation, settings=settings, seed=seed, device=device.type)[1]


def time_ours(spec, examples, validation, *, epochs, seed, device, overrides):
    whole = [f"train.epochs={epochs}", "train.min_steps=0", "train.patience=0"]
    run = load_config(overrides=[*overrides, *whole], values={"seed": seed, "device": str(device)})
    dtype = find_dtype(run.train.precision, device)
    backbone = load_backbone("minilm", dtype=dtype)
    set_training_attention(backbone, device)
    model = SparseExpertModel(backbone, pooling=run.experts.pooling)
    ready = {spec.name: TrainingTask(spec, list(examples), list(examples), validation)}
    add_tasks(model, ready, run=run)
    model.experts.set_dropout(run.experts.dropout)
    model.to(device)
    with tempfile.TemporaryDirectory() as output:
        started = time.perf_counter()
        fit(model, ready, run=run, output=Path(output), resume=False)
        return time.perf_counter() - started


def peak(device, dtype):
    """Measure the FLOP a second of a large matrix product."""
    size, times = (2048, 1) if device.type == "cpu" else (8192, 10)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        for _ in range(times):
            product = left @ right
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 * times / statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="of both: cpu, or cuda")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="section.key=value, for ours")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = find_device(options.device)
    transformers.logging.set_verbosity_error()

    spec = load_task("conll2003")
    results = read(spec, data=options.data_root / "conll2003", splits=["train", "validation"])
    spec = spec.model_copy(update={"labels": label_names(spec, results["train"])})
    encoder = Encoder(load_backbone("minilm"), max_length=256)
    columns = results["train"].to_dict()
    every = find_kind(spec.kind).encode(columns, encoder=encoder, labels=spec.label_names, language="en")
    one_row = encode_rows(results["validation"].select([0]).to_dict(), spec=spec, encoder=encoder)
    ratios, ours, peft = [], [], []
    for number in range(options.rounds):
        rows = random.Random(number).sample(every, options.rows)
        tokens = sum(len(row.input_ids) for row in rows) * options.epochs
        same = {"epochs": options.epochs, "seed": number, "device": device}
        peft.append(tokens / time_peft(spec, rows, one_row, **same))
        ours.append(tokens / time_ours(spec, rows, one_row, overrides=options.overrides, **same))
        ratios.append(ours[-1] / peft[-1])
        shown = f"PEFT {peft[-1]:,.0f} tok/s, sparse-ft {ours[-1]:,.0f} tok/s, ratio {ratios[-1]:.2f}"
        print(f"round {number + 1}: {shown}", flush=True)
    shown = [f"{statistics.median(values):,.0f}" for values in (peft, ours)]
    print(f"median of {options.rounds}: PEFT {shown[0]}, sparse-ft {shown[1]}, ratio {statistics.median(ratios):.2f}")
    backbone, first_block = load_backbone("minilm"), load_config(overrides=options.overrides).experts.first_block
    above = [linear for name, linear in backbone.linears.items() if backbone.block_of(name) >= first_block]
    weights = sum(linear.weight.numel() for linear in above)
    precision = load_config(overrides=options.overrides).train.precision
    most = peak(device, find_dtype(precision, device))
    share = statistics.median(ours) * 4 * weights / most
    each = f"{4 * weights / 1e6:.0f} MFLOP a token from block {first_block} up"
    print(f"{each}; peak {most / 1e9:,.0f} GFLOP/s, of which sparse-ft reaches {share:.0%}")


if __name__ == "__main__":
    run(main)
