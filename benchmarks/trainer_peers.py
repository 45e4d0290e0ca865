"""The peers of our experts on the same backbone, trained by transformers' Trainer on the same rows, scored alike.

full: all weights. full_pooled: all weights, but a text is read off the mean over its tokens, scaled to one length, as
ours do by default. head: only what stands on the backbone. bitfit: that and the biases (Ben Zaken et al. 2022,
https://arxiv.org/abs/2106.10199). peft: a LoRA of PEFT with its defaults and those of the Trainer, in batches of 8.

All but full_pooled read a text as transformers' classes do it: BERT's from its first token through the pooler.
Tagging is scored with legal tags only, as our experts are; the F1 of the best tag of each word is kept as ``plain_f1``.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from sparse_ft.backbone.backbone import Backbone, load_backbone
from sparse_ft.backbone.devices import find_device, find_dtype
from sparse_ft.backbone.encoding import Encoder, Example
from sparse_ft.backbone.pooling import pool
from sparse_ft.config import load_config
from sparse_ft.evaluation.scoring import score_rows
from sparse_ft.tasks.encoded_rows import EncodedRows, encode_rows
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.kinds.kind import IGNORED
from sparse_ft.tasks.kinds.scores import Score
from sparse_ft.tasks.reading import label_names, read
from sparse_ft.tasks.sources import scored_split
from sparse_ft.tasks.spec import TaskSpec, load_task

RECIPES = {
    "conll2003": (1e-4, 4),
    "sst2": (1e-4, 3),
    "ag_news": (1e-4, 3),
    "clinc150": (1e-4, 8),
    "banking77": (1e-4, 8),
}
"""Learning rate and epochs of the full fine-tune by task; others get those of ``conll2003``."""

RATES = {"full": 1.0, "full_pooled": 1.0, "bitfit": 10.0, "head": 10.0}
"""Factor on the learning rate: what trains few weights needs a higher one."""


PEFT_EPOCHS = 3
"""The Trainer's default, which ``peft`` keeps."""


PEER_KINDS = ("classification", "token_classification")
"""What transformers has a class for that reads rows as ours do."""


def run_trainer(
    method: str,
    task: str,
    source: Path | None,
    seed: int,
    overrides: list[str],
    *,
    epochs: int | None = None,
    backbone: str = "minilm",
    device: str = "cpu",
    batch_size: int = 32,
) -> dict[str, Any]:
    """Train on the rows that an expert would get, and score validation after each epoch and test once.

    ``epochs`` is for rows so few that the recipe's would be a handful of steps. Without answers to test, validation is
    scored in its index.
    """
    began = time.perf_counter()
    bounds = load_config(overrides=overrides).data
    loaded = load_backbone(backbone)
    encoder = Encoder(loaded, max_length=bounds.max_length)
    spec = load_task(task)
    split = scored_split(spec, None if source is None else str(source))
    results = read(spec, data=source)
    labels = label_names(spec, results["train"])
    spec = spec.with_labels(labels)
    rows = results["train"]
    if bounds.train_limit is not None and len(rows) > bounds.train_limit:  # the same rows as the expert's
        rows = rows.shuffle(seed=seed).select(range(bounds.train_limit))
    kind = find_kind(spec.kind)
    train = kind.encode(rows.to_dict(), encoder=encoder, labels=spec.label_names, language=spec.language)
    evaluated = {
        name: encode_rows(results[name].to_dict(), spec=spec, encoder=encoder)
        for name in dict.fromkeys(("validation", split))
    }
    torch.manual_seed(seed)
    classifier = Classifier(spec, loaded, method=method)
    rate, usual = RECIPES.get(spec.name, RECIPES["conll2003"])
    epochs = epochs or (PEFT_EPOCHS if method == "peft" else usual)
    settings: dict[str, Any] = {"num_train_epochs": epochs}
    if method != "peft":
        settings |= {
            "learning_rate": rate * RATES[method],
            "per_device_train_batch_size": batch_size,
            "bf16": find_dtype("auto", find_device(device)) == torch.bfloat16,  # as ours
            **_OURS,
        }
    best, training = classifier.train(train, evaluated["validation"], settings=settings, seed=seed, device=device)
    entry = classifier.score(evaluated[split])
    tokens = sum(len(example.input_ids) for example in train) * epochs
    return {
        "metrics": entry.metrics,
        "metric": spec.metric,
        "scored_on": f"{split}, {entry.n:,} rows",
        "headline": entry.metrics[spec.metric],
        "token_report": entry.token_report,
        "validation": best,
        "epochs": epochs,
        "seconds": time.perf_counter() - began,
        "tokens_per_second": tokens / training,
        "trainable": sum(value.numel() for value in classifier.model.parameters() if value.requires_grad),
    }


_OURS: dict[str, Any] = {
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "length",
}
"""What the Trainer is told where it does not run with its defaults."""


class _PooledClassifier(torch.nn.Module):
    """One answer a text, read off the mean over its tokens as our heads do; dropout and first weights as BERT's class.

    Args:
        backbone: All of whose weights are trained.
        outputs: Number of labels.
    """

    def __init__(self, backbone: Backbone, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone.model.requires_grad_(True)
        self.dropout, self.head = torch.nn.Dropout(0.1), torch.nn.Linear(backbone.hidden_size, outputs)
        torch.nn.init.normal_(self.head.weight, std=0.02)
        torch.nn.init.zeros_(self.head.bias)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        tokens = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        logits = self.head(self.dropout(pool(tokens, attention_mask, "unit")))
        return SequenceClassifierOutput(None if labels is None else cross_entropy(logits, labels), logits)


class Classifier:
    """A classifier of transformers, or ours above, on a backbone; the method says which weights are trained."""

    def __init__(self, spec: TaskSpec, loaded: Backbone, *, method: str) -> None:
        self.spec, self.pad_id, self.kind = spec, loaded.pad_id, find_kind(spec.kind)
        self.words = self.kind.level == "word"
        self.outputs = self.kind.outputs(spec.label_names or [])
        if method == "full_pooled" and not self.words:
            self.model = _PooledClassifier(loaded, len(self.outputs))
            return
        head = AutoModelForTokenClassification if self.words else AutoModelForSequenceClassification
        self.model = head.from_pretrained(loaded.folder, num_labels=len(self.outputs), dtype=torch.float32)
        self.model.config.pad_token_id = loaded.pad_id
        if method == "peft":
            kind = TaskType.TOKEN_CLS if self.words else TaskType.SEQ_CLS
            self.model = get_peft_model(self.model, LoraConfig(task_type=kind))
        elif method not in ("full", "full_pooled"):
            for name, parameter in self.model.named_parameters():
                on_top = not name.startswith(f"{self.model.base_model_prefix}.") or ".pooler." in name
                parameter.requires_grad_(on_top or (method == "bitfit" and name.endswith(".bias")))

    def features(self, examples: Sequence[Example], *, answered: bool = True) -> list[dict[str, Any]]:
        rows = []
        for example in examples:
            row: dict[str, Any] = {"input_ids": example.input_ids, "length": len(example.input_ids)}
            if example.token_type_ids is not None:
                row["token_type_ids"] = example.token_type_ids
            if not answered:
                pass
            elif self.words:
                row["labels"] = [IGNORED] * len(example.input_ids)
                for position, target in zip(example.word_positions, example.targets, strict=True):
                    row["labels"][position] = target
            else:
                row["labels"] = example.targets[0]
            rows.append(row)
        return rows

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (longest - len(values))

        types = {}
        if any(row.get("token_type_ids") for row in rows):
            types["token_type_ids"] = torch.tensor([padded(list(row["token_type_ids"]), 0) for row in rows])
        answers = [row["labels"] for row in rows if "labels" in row]
        if answers:
            types["labels"] = torch.tensor([padded(row, IGNORED) for row in answers] if self.words else answers)
        return types | {
            "input_ids": torch.tensor([padded(row["input_ids"], self.pad_id) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        }

    @torch.no_grad()
    def score(self, data: EncodedRows) -> Score:
        self.model.eval()
        sizes = data.num_parts or [1] * data.num_rows
        logits = [torch.zeros(size, len(self.outputs)) for size in sizes]
        order = np.argsort([-len(example.input_ids) for example in data.examples], kind="stable")
        for start in range(0, len(order), 32):
            chosen = [data.examples[index] for index in order[start : start + 32]]
            batch = self.collate(self.features(chosen, answered=False))
            outputs = self.model(**{name: value.to(self.model.device) for name, value in batch.items()}).logits
            for example, row in zip(chosen, outputs.float().cpu(), strict=True):
                if self.words:
                    logits[example.row][example.word_indices] = row[example.word_positions]
                else:
                    logits[example.row] = row
        scored = score_rows(
            self.spec, data, self.kind.predictions(logits, columns=data.columns, labels=self.spec.label_names or [])
        )
        if self.words:
            plain = [[self.outputs[index] for index in row.argmax(-1).tolist()] for row in logits]
            scored.metrics["plain_f1"] = score_rows(self.spec, data, plain).metrics["f1"]
        return scored

    def train(
        self, examples: Sequence[Example], validation: EncodedRows, *, settings: dict[str, Any], seed: int, device: str
    ) -> tuple[float, float]:
        """Train, keep the weights of the best epoch, and return its validation score and the seconds of training."""
        rows = datasets.Dataset.from_list(self.features(examples))
        with tempfile.TemporaryDirectory() as output:
            trainer = _BestEpoch(
                model=self.model,
                args=TrainingArguments(
                    output_dir=output,
                    **settings,
                    eval_strategy="epoch",
                    save_strategy="no",
                    report_to=[],
                    seed=seed,
                    use_cpu=device == "cpu",
                    disable_tqdm=True,
                    remove_unused_columns=False,
                ),
                train_dataset=rows,
                eval_dataset=rows.select([0]),
                data_collator=self.collate,
            )
            trainer.score = lambda: self.score(validation).metrics[self.spec.metric]
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started - trainer.seconds
        self.model.load_state_dict(trainer.state_dict)
        return trainer.best, seconds


class _BestEpoch(Trainer):
    """Scores validation after each epoch with our scorer and keeps the best weights."""

    best, state_dict, score, seconds = -1.0, None, None, 0.0

    def evaluate(self, *args, **kwargs):
        started = time.perf_counter()
        value = self.score()
        if value >= self.best:  # of equals the one that has learnt longest, as ours
            self.best = value
            self.state_dict = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        self.seconds += time.perf_counter() - started
        return {"eval_score": value}
