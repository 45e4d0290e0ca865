"""A content recommender: which texts of a catalogue are like those that a reader liked, in topic and in mood?

Train once (a few minutes), then run:

    sparse-ft train --task topic --task sentiment --output runs/reader
    python examples/recommender/recommend.py --checkpoint runs/reader

The features of a text are what the topic expert and the sentiment expert say of it: one logit a label, standardised
over the catalogue. A text is recommended by the cosine between its features and the mean of those that were liked.
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import sparse_ft

HERE = Path(__file__).parent
TASKS = ("topic", "sentiment")


def features(model: sparse_ft.LoadedModel, texts: list[str]) -> Tensor:
    """Return the logits of all labels, (texts, labels)."""
    return torch.cat([model.logits(texts, task) for task in TASKS], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="With the tasks topic and sentiment.")
    parser.add_argument("--catalogue", type=Path, default=HERE / "catalogue.csv", help="CSV with id and text.")
    parser.add_argument("--liked", type=Path, default=HERE / "liked.txt", help="One text a line.")
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()

    model = sparse_ft.load(options.checkpoint)
    with options.catalogue.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    liked = options.liked.read_text(encoding="utf-8").splitlines()
    catalogue = features(model, [row["text"] for row in rows])
    mean, spread = catalogue.mean(0), catalogue.std(0)
    profile = ((features(model, liked) - mean) / spread).mean(0)
    closeness = functional.cosine_similarity((catalogue - mean) / spread, profile.unsqueeze(0))
    print("Liked:", *(f"  {text}" for text in liked), "Recommended:", sep="\n")
    best = closeness.topk(min(options.top, len(rows)))
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"  {score:+.2f}  {rows[index]['id']:<4} {rows[index]['text']}")


if __name__ == "__main__":
    main()
