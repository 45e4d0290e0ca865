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

from sparse_ft.resources import packaged_minilm_dir

TEXT = "Marta Lindqvist joined Volvo in Gothenburg last spring."
BARE = f"""
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer
folder = {str(packaged_minilm_dir())!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=9).eval()
with torch.no_grad():
    print(model(**tokenizer({TEXT!r}, return_tensors="pt")).logits.argmax(-1).tolist())
"""


def seconds(command):
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    ours_command = [sys.executable, "-c", "from sparse_ft.cli import main; main()", "predict", options.checkpoint, TEXT]
    ours_command += ["--device", "cpu"]
    bare_command = [sys.executable, "-c", BARE]
    seconds(ours_command), seconds(bare_command)  # fill the disk cache
    ours, bare, ratios = [], [], []
    for _ in range(options.rounds):
        bare.append(seconds(bare_command))
        ours.append(seconds(ours_command))
        ratios.append(ours[-1] / bare[-1])
    medians = [statistics.median(values) for values in (bare, ours, ratios)]
    print(f"median of {options.rounds}: bare {medians[0]:.2f} s, sparse-ft {medians[1]:.2f} s, ratio {medians[2]:.2f}")


if __name__ == "__main__":
    main()
