"""A cold `sparse-ft predict` on one text against a bare transformers script that loads the same backbone and predicts.

    python benchmarks/cold_predict.py CHECKPOINT

Each run is a new process; the sides take turns. The bare script loads MiniLM with a token-classification head of the
same size and prints the tags of the same text.
"""

import argparse
import statistics
import subprocess
import sys
import time

from script import run

from sparse_ft.backbone.backbone import load_backbone

TEXT = "Marta Lindqvist joined Volvo in Gothenburg last spring."
BARE = """
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer
folder = FOLDER
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=9).eval()
with torch.no_grad():
    print(model(**tokenizer(TEXT, return_tensors="pt")).logits.argmax(-1).tolist())
"""


def seconds(command):
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    ours_command = [
        sys.executable,
        "-c",
        "from sparse_ft.cli.main import main; main()",
        "predict",
        options.checkpoint,
        TEXT,
    ]
    ours_command += ["--device", "cpu"]
    folder = str(load_backbone("minilm").folder)
    bare_command = [sys.executable, "-c", f"FOLDER, TEXT = {folder!r}, {TEXT!r}{BARE}"]
    seconds(ours_command), seconds(bare_command)  # fill the disk cache
    ours, bare, ratios = [], [], []
    for _ in range(options.rounds):
        bare.append(seconds(bare_command))
        ours.append(seconds(ours_command))
        ratios.append(ours[-1] / bare[-1])
    medians = [statistics.median(values) for values in (bare, ours, ratios)]
    print(f"median of {options.rounds}: bare {medians[0]:.2f} s, sparse-ft {medians[1]:.2f} s, ratio {medians[2]:.2f}")


if __name__ == "__main__":
    run(main)
