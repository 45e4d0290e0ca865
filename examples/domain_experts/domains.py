"""Domain experts: one sentiment expert for hotels, one for gadgets, and a gate that picks.

    python examples/domain_experts/domains.py --output runs/domains

trains both on small samples (a minute or two) and fits the gate among them. Then reviews of either kind are answered
without saying which they are; and once more by both experts together, as an ensemble.
"""

import argparse
from pathlib import Path

import sparse_ft

HERE = Path(__file__).parent
REVIEWS = [
    "The bathroom was filthy and nobody came to clean it.",
    "Sound quality is fantastic for such a small speaker.",
    "The night porter was friendly and the bed was huge.",
    "It stopped charging after a week.",
    "Great location and a delicious breakfast.",
    "The remote needs three presses before anything happens.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Folder of the new checkpoint.")
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--quick", action="store_true", help="A few steps only, to see that it runs.")
    options = parser.parse_args()

    tasks = [str(HERE / f"{domain}.yaml") for domain in ("hotels", "gadgets")]
    # So few rows are seen many times, and the scores of a handful of validation rows must not end the run early.
    small = ["train.batch_size=8", "train.min_steps=100", "train.patience=0"]
    steps = ["train.epochs=1", "train.min_steps=0"] if options.quick else small
    sparse_ft.train(tasks, output=options.output, backbone=options.backbone, overrides=steps)
    model = sparse_ft.load(options.output)
    print("\nThe gate picks:")
    for answer in model(REVIEWS):
        ((domain, results),) = answer.tasks.items()
        print(f"  {domain:<8} {answer.routing[domain]:.2f}   {results['label']} {results['score']:.2f}   {answer.text}")
    print("\nBoth experts, their probabilities averaged:")
    for answer in model.predict(REVIEWS, ["hotels", "gadgets"], combine="average"):
        results = answer.tasks["hotels"]
        print(f"  {results['label']} {results['score']:.2f}   {answer.text}")


if __name__ == "__main__":
    main()
