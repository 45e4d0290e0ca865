"""Train on the bundled samples alone and score on public data: do the samples teach the task?

    python benchmarks/transfer.py --data-root DATA

sentiment -> SST-2 test, topic -> AG News test, ner -> CoNLL-2003 test. The public data is read through its own task
file; the label names are the same on both sides. No public row is trained on.
"""

import argparse
import tempfile
from pathlib import Path

from script import chosen, numbers, run

from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.evaluation.scoring import predict_rows, score_rows
from sparse_ft.tasks.encoded_rows import encode_rows
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.spec import load_task
from sparse_ft.training.train import train

PAIRS = {"sentiment": ("sst2", "test"), "topic": ("ag_news", "test"), "ner": ("conll2003", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(PAIRS))
    parser.add_argument("--seeds", default="13,14,15")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    for task in chosen(options.tasks, PAIRS, what="bundled task with public data"):
        public, split = PAIRS[task]
        rows = read(load_task(public), data=options.data_root / public, splits=[split])[split]
        for seed in numbers(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "run"
                result = train([task], output=output, seed=seed, overrides=options.overrides, device="cpu")
                checkpoint = load_checkpoint(output)
            spec = checkpoint.tasks[task]
            encoder = checkpoint.encoder
            data = encode_rows(rows.to_dict(), spec=spec, encoder=encoder)
            score = score_rows(spec, data, predict_rows(checkpoint.model, spec, data))
            own = result.scores[task][spec.metric]
            best = max(entry["validation"][task] for entry in result.history)
            print(
                f"{task} seed {seed}: own validation {best:.3f}, own test {own:.3f}, "
                f"{public} {split} {spec.metric} {score.metrics[spec.metric]:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
