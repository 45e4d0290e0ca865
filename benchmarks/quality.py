"""Score our experts against a full fine-tune of the same backbone, on public data.

    python benchmarks/quality.py --data-root DATA --tasks conll2003,sst2 --methods expert,full --seeds 13,14,15

Both methods read the same rows through the same tokens and are scored by the same code; the validation split chooses
the best epoch, and test is scored once per run. The full fine-tune is transformers' Trainer over all weights of
``AutoModelFor…Classification``; for tagging it is scored with legal tags only, as ours, and kept beside that is the F1 of
the best tag of each word (``plain_f1``). Each finished run is one line of ``--results``; what is there already is not run
again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

import sparse_ft.training
from sparse_ft.backbone import load_backbone
from sparse_ft.config import load_config
from sparse_ft.encoding import Encoder
from sparse_ft.evaluation import prepare, score_rows
from sparse_ft.kinds import find_kind
from sparse_ft.kinds.classification import IGNORED
from sparse_ft.readers import label_names, read
from sparse_ft.resources import packaged_minilm_dir
from sparse_ft.tasks import load_task

# Learning rate and epochs of the full fine-tune.
FULL = {
    "conll2003": (1e-4, 4),
    "sst2": (1e-4, 3),
    "ag_news": (1e-4, 3),
    "clinc150": (1e-4, 8),
    "banking77": (1e-4, 8),
}


def run_expert(task: str, source: Path, seed: int, overrides: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = sparse_ft.training.train(
            [task], data=source, output=Path(folder) / "run", seed=seed, overrides=overrides, device="cpu"
        )
        seconds = time.perf_counter() - started
        files = [
            *(Path(folder) / "run" / "experts").rglob("*.safetensors"),
            *(Path(folder) / "run" / "heads").iterdir(),
        ]
        entry = result.evaluation.tasks[task]
        return {
            "metrics": entry.score.metrics,
            "token_report": entry.score.token_report,
            "validation": max(epoch["validation"][task] for epoch in result.history),
            "epochs": len(result.history),
            "seconds": seconds,
            "tokens_per_second": result.tokens_per_second,
            "trainable": sum(file.stat().st_size for file in files) // 4,
        }


def run_full(task: str, source: Path, seed: int, overrides: list[str]) -> dict:
    limit = load_config(overrides=overrides).data.train_limit
    folder = packaged_minilm_dir()
    backbone = load_backbone("minilm")
    encoder = Encoder(backbone, max_length=256)
    spec = load_task(task)
    found = read(spec, data=source)
    labels = label_names(spec, found["train"])
    spec = spec.model_copy(update={"labels": spec.labels if isinstance(spec.labels, dict) else labels})
    kind = find_kind(spec.kind)
    words = kind.level == "word"
    outputs = kind.outputs(spec.label_names)
    rows = found["train"]
    if limit is not None and len(rows) > limit:  # the same rows as the expert's
        rows = rows.shuffle(seed=seed).select(range(limit))
    train = kind.encode(rows.to_dict(), encoder=encoder, labels=spec.label_names, language=spec.language)
    evaluated = {split: prepare(found[split].to_dict(), spec=spec, encoder=encoder) for split in ("validation", "test")}
    torch.manual_seed(seed)
    head = AutoModelForTokenClassification if words else AutoModelForSequenceClassification
    model = head.from_pretrained(folder, num_labels=len(outputs), attn_implementation="eager")

    def features(examples):
        rows = []
        for example in examples:
            row = {"input_ids": example.input_ids, "length": len(example.input_ids)}
            if words:
                row["labels"] = [IGNORED] * len(example.input_ids)
                for position, target in zip(example.word_positions, example.targets, strict=True):
                    row["labels"][position] = target
            else:
                row["labels"] = example.targets[0]
            rows.append(row)
        return rows

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        padded = [row["input_ids"] + [backbone.pad_id] * (longest - len(row["input_ids"])) for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        targets = (
            [row["labels"] + [IGNORED] * (longest - len(row["labels"])) for row in rows]
            if words
            else [row["labels"] for row in rows]
        )
        return {
            "input_ids": torch.tensor(padded),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(targets),
        }

    @torch.no_grad()
    def score(data):
        model.eval()
        rows = (
            [torch.zeros(count, len(outputs)) for count in data.num_words]
            if words
            else [torch.zeros(len(outputs))] * data.num_rows
        )
        order = np.argsort([-len(example.input_ids) for example in data.examples], kind="stable")
        for start in range(0, len(order), 32):
            chosen = [data.examples[place] for place in order[start : start + 32]]
            batch = collate(features(chosen))
            batch.pop("labels")
            logits = model(**batch).logits
            for example, row in zip(chosen, logits, strict=True):
                if words:
                    rows[example.row][example.word_indices] = row[example.word_positions]
                else:
                    rows[example.row] = row
        scored = score_rows(spec, data, kind.predictions(rows, labels=spec.label_names))
        if words:
            plain = [[outputs[place] for place in row.argmax(-1).tolist()] for row in rows]
            scored.metrics["plain_f1"] = score_rows(spec, data, plain).metrics["f1"]
        return scored

    class BestEpoch(Trainer):
        """Scores validation after each epoch with our scorer and keeps the best weights."""

        best, state_dict = -1.0, None

        def evaluate(self, *args, **kwargs):
            value = score(evaluated["validation"]).metrics[spec.metric]
            if value > self.best:
                self.best, self.state_dict = value, {k: v.clone() for k, v in model.state_dict().items()}
            return {"eval_score": value}

    rate, epochs = FULL[task]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            learning_rate=rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            warmup_steps=0.1,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        rows = datasets.Dataset.from_list(features(train))
        trainer = BestEpoch(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows.select([0]), data_collator=collate
        )
        trainer.train()
    model.load_state_dict(trainer.state_dict)
    entry = score(evaluated["test"])
    return {
        "metrics": entry.metrics,
        "token_report": entry.token_report,
        "validation": trainer.best,
        "epochs": epochs,
        "seconds": time.perf_counter() - started,
        "trainable": sum(parameter.numel() for parameter in model.parameters()),
    }


METHODS = {"expert": run_expert, "full": run_full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder with conll2003/, sst2/, …")
    parser.add_argument("--tasks", default=",".join(FULL))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="13,14,15")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        help="section.key=value; the full fine-tune heeds data.train_limit",
    )
    parser.add_argument("--note", default="", help="kept with each result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = set()
    if options.results.exists():
        for line in options.results.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            done.add((entry["task"], entry["method"], entry["seed"], entry["note"]))
    for seed in [int(seed) for seed in options.seeds.split(",")]:
        for task in options.tasks.split(","):
            for method in options.methods.split(","):
                if (task, method, seed, options.note) in done:
                    continue
                result = METHODS[method](task, options.data_root / task, seed, options.overrides)
                entry = {"task": task, "method": method, "seed": seed, "note": options.note, **result}
                with options.results.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(entry) + "\n")
                shown = {key: round(value, 4) for key, value in entry["metrics"].items()}
                print(
                    task,
                    method,
                    seed,
                    options.note,
                    f"validation {entry['validation']:.4f}",
                    shown,
                    f"{entry['seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
