r"""Bring your own task in ten minutes: tables of texts and labels, and a task file of six lines.

1. `train.csv`, `validation.csv` and `test.csv` hold messages to a caretaker and the team that each belongs to: put your
   rows in their index. Validation chooses the best epoch, so it should not be tiny; test is looked at once, at the end.
2. `repairs.yaml` names their columns; the labels are those results in the rows.
3. Train (a minute or two), look at the scores, ask:

    python examples/own_task/repairs.py --output runs/repairs

On the command line the same is

    sparse-ft train --task examples/own_task/repairs.yaml --output runs/repairs \
        --set train.batch_size=8 --set train.min_steps=100 --set train.patience=0
    sparse-ft predict runs/repairs "The lights went out on the second floor."
"""

import argparse
from pathlib import Path

import sparse_ft

HERE = Path(__file__).parent
NEW = [
    "The lights went out on the second floor.",
    "It is freezing in the conference room.",
    "There is a puddle under the washbasin.",
    "Somebody left pizza boxes all over the lounge.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Folder of the new checkpoint.")
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--quick", action="store_true", help="A few steps only, to see that it runs.")
    options = parser.parse_args()

    # So few rows are seen many times, and the scores of a handful of validation rows must not end the run early.
    small = ["train.batch_size=8", "train.min_steps=100", "train.patience=0"]
    steps = ["train.epochs=1", "train.min_steps=0"] if options.quick else small
    task = str(HERE / "repairs.yaml")
    result = sparse_ft.train([task], output=options.output, backbone=options.backbone, overrides=steps)
    print(result.evaluation.to_text())
    for answer in sparse_ft.load(result.path).predict(NEW, "repairs"):
        team = answer.tasks["repairs"]
        print(f"{team['label']:<12} {team['score']:.2f}   {answer.text}")


if __name__ == "__main__":
    main()
