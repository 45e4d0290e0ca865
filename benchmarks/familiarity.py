"""Which share of one's own held-out texts does a gate turn away at each --min-familiarity, and which of foreign texts?

    python benchmarks/familiarity.py --data-root DATA

Each set gives ``--rows`` training rows and as many held-out rows of the same split; BANKING77 gives ten rows of each of
64 classes. One gate for each row of the table is fitted on four sets; the rates are those of its own sets.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from routing import Seen, foreign_texts
from script import run

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.config import GateConfig
from sparse_ft.experts.inference import mean_states
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import label_names, read
from sparse_ft.tasks.spec import load_task
from sparse_ft.training.fit_gate import fit_on_means

THRESHOLDS = (0.005, 0.008, 0.01, 0.02, 0.05)
GATES = (("sst2", "ag_news", "clinc150", "conll2003"), ("sst2", "ag_news", "conll2003", "banking77"))
CLASSES, ROWS_OF_A_CLASS = 64, 10
BLOCK = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000, help="training rows a set, and at most as many held-out rows")
    parser.add_argument("--foreign", type=int, default=300, help="foreign texts of each sort")
    parser.add_argument("--seed", type=int, default=13)
    options = parser.parse_args()
    backbone = load_backbone("minilm")
    encoder, model = Encoder(backbone, max_length=256), SparseExpertModel(backbone).eval()
    train, held_out = {}, {}
    for name in dict.fromkeys(name for names in GATES for name in names):
        spec = load_task(name)
        rows = read(spec, data=options.data_root / name, splits=["train"])["train"]
        few = name == "banking77"
        indices = drawn_rows(list(rows["label"]) if few else [""] * len(rows), options.rows, seed=options.seed, few=few)
        columns, labels = rows.select([*indices[0], *indices[1]]).to_dict(), label_names(spec, rows)
        examples = find_kind(spec.kind).encode(columns, encoder=encoder, labels=labels, language=spec.language)
        first = {example.row: example for example in reversed(examples)}
        every = [first[row] for row in sorted(first)]
        means, tokens = mean_states(model, every, block=BLOCK), [example.input_ids for example in every]
        number = len(indices[0])
        train[name] = Seen(means[:number], tokens[:number])
        held_out[name] = Seen(means[number:], tokens[number:])
    foreign = {}
    for sort, texts in foreign_texts(options.data_root, options.foreign, 0).items():
        encoded = encoder.texts(texts)
        foreign[sort] = Seen(mean_states(model, encoded, block=BLOCK), [example.input_ids for example in encoded])
    for names in GATES:
        gate = fit_on_means(
            {name: train[name].means for name in names},
            {name: train[name].tokens for name in names},
            settings=GateConfig(),
            seed=options.seed,
        )
        print(f"gate of {', '.join(names)}; turned away at {', '.join(map(str, THRESHOLDS))}")
        for name, part in [*((name, held_out[name]) for name in names), *foreign.items()]:
            confidence = gate.decide(part.means, part.tokens).confidence
            assert confidence is not None
            shares = [f"{float((confidence < threshold).float().mean()):.3f}" for threshold in THRESHOLDS]
            print(f"{name:18} {len(part.tokens):5} {' '.join(shares)}", flush=True)


def drawn_rows(labels: Sequence[str], number: int, *, seed: int, few: bool) -> tuple[list[int], list[int]]:
    """Draw training rows and as many held-out rows, or ten rows of each of 64 classes and further rows of these."""
    generator = random.Random(seed)
    order = generator.sample(range(len(labels)), len(labels))
    if not few:
        return order[:number], order[number : 2 * number]
    classes = set(generator.sample(sorted(set(labels)), min(CLASSES, len(set(labels)))))
    by_class: dict[str, list[int]] = {}
    for index in order:
        if labels[index] in classes:
            by_class.setdefault(labels[index], []).append(index)
    rest = [index for indices in by_class.values() for index in indices[ROWS_OF_A_CLASS:]]
    first = [indices[rank] for rank in range(ROWS_OF_A_CLASS) for indices in by_class.values() if rank < len(indices)]
    return first, generator.sample(rest, min(number, len(rest)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
