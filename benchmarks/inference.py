"""Answers for a file of real texts, from strings to labels: texts a second, ours against one model for each task.

    python benchmarks/inference.py runs/sentiment+topic+intent+ner --texts lines.txt

The tasks of the first checkpoint are exported to transformers, one dense model each, which run in two ways: in
transformers' pipelines, as most people do it, and sorted by length in batches as large as ours. The bare backbone is
sorted, too. Further checkpoints are timed beside the first, for instance one with experts in the upper blocks only.
``all tasks`` answers every task by its own expert; ``gate's choice`` those of the expert that fits a text most. Ours
gives spans and probabilities, the sorted models the best label alone. Every figure is the median of rounds in which all
variants take turns.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from script import run as run_script
from timing import Run, measure, ratio
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.batching import length_batches, token_limit
from sparse_ft.cli.text_files import read_file
from sparse_ft.integrations.export import export
from sparse_ft.prediction.loaded_model import LoadedModel, load
from sparse_ft.tasks.kinds import find_kind

BARE = "bare backbone, sorted"


@torch.no_grad()
def sorted_labels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, max_length: int
) -> list[torch.Tensor]:
    """Return the best labels of each text, in order; of a model without a head, the mean of its hidden states."""
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    results: dict[int, torch.Tensor] = {}
    for rows in length_batches(lengths, max_tokens=token_limit(model.device)):
        batch = {
            name: pad_sequence(
                [torch.tensor(values[row]) for row in rows],
                batch_first=True,
                padding_value=tokenizer.pad_token_id if name == "input_ids" else 0,
            )
            for name, values in encoded.items()
        }
        output = model(**batch)
        best = output.logits.argmax(-1) if "logits" in output else output.last_hidden_state.mean(1)
        results.update(zip(rows, best, strict=True))
    return [results[row] for row in range(len(texts))]


def dense_models(model: LoadedModel, texts: list[str], folder: Path) -> dict[str, Run]:
    """Export every task as a dense model, and return both ways to run them all."""
    export(model, format="transformers", output=folder)
    max_length = model.checkpoint.config.data.max_length
    pipelines, pairs = [], []
    for task, spec in model.tasks.items():
        path = folder / task
        words = find_kind(spec.kind).level == "word"
        auto = AutoModelForTokenClassification if words else AutoModelForSequenceClassification
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        tokenizer.model_max_length = max_length
        dense = auto.from_pretrained(path, trust_remote_code=True).eval()
        pairs.append((dense, tokenizer))
        kind, settings = ("token-classification", {}) if words else ("text-classification", {"truncation": True})
        pipelines.append((pipeline(kind, model=dense, tokenizer=tokenizer), settings))
    number = len(pairs)
    return {
        f"{number} dense models, pipelines": lambda: [run(texts, batch_size=32, **more) for run, more in pipelines],
        f"{number} dense models, sorted": lambda: [
            sorted_labels(dense, tokenizer, texts, max_length=max_length) for dense, tokenizer in pairs
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--texts", required=True, help="a file with one text a line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = [text for text in read_file(options.texts, form="text") if text.strip()]
    models = {str(path): load(path, device="cpu") for path in options.checkpoints}
    first = next(iter(models.values()))
    backbone = load_backbone(first.checkpoint.config.backbone)
    max_length = first.checkpoint.config.data.max_length
    with tempfile.TemporaryDirectory() as folder:
        variants: dict[str, Run] = {
            BARE: lambda: sorted_labels(backbone.model, backbone.tokenizer, texts, max_length=max_length),
            **dense_models(first, texts, Path(folder) / "dense"),
        }
        for name, model in models.items():
            variants[f"{name}, all tasks"] = lambda model=model: model.predict(texts, "all")
            if model.checkpoint.model.sequence_gate is not None:
                variants[f"{name}, gate's choice"] = lambda model=model: model.predict(texts)
        seconds = measure(variants, rounds=options.rounds)
    print(
        f"| {len(texts):,} texts, {len(first.tasks)} tasks | texts a second | time / bare backbone |\n|---|---:|---:|"
    )
    for name, values in seconds.items():
        rate = len(texts) / statistics.median(values)
        print(f"| {name} | {rate:.0f} | {ratio(seconds, name, BARE):.2f} |")


if __name__ == "__main__":
    run_script(main)
