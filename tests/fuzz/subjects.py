"""What is damaged, and the command that meets it: every kind of file that users give to the command line."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tiny_backbones import save_tiny
from toy_checkpoints import HEADS, LABELS, add_random_expert, save_model, wrap
from toys import toy_rows, write_rows, write_toy
from transformers import AutoConfig

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.experts.gates import SequenceGate
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.selection import Selection


@dataclass(frozen=True)
class Subject:
    """One kind of input: the files that are damaged, and the command that reads them."""

    name: str
    files: str
    """Glob of the files of which one is damaged, relative to the folder of a case."""
    command: str
    """Arguments in the folder of a case; ``{bert}`` is the backbone, and ``out`` the output if there is one."""
    is_checkpoint: bool = False
    """Whether the answers of the damaged input must be refused, or be those of the undamaged one."""


PREDICT = "predict checkpoint --device cpu --json 'Ada Lovelace met Mozart in London'"
TRAIN = "train --backbone {bert} --device cpu --output out --set train.epochs=1"
SUBJECTS = (
    Subject("task file", "mood.yaml", f"{TRAIN} --task mood.yaml"),
    Subject("task file of tags", "names.yaml", f"{TRAIN} --task names.yaml"),
    Subject("rows in JSONL", "mood/*.jsonl", f"{TRAIN} --task mood.yaml"),
    Subject("tags in JSONL", "names/*.jsonl", f"{TRAIN} --task names.yaml"),
    Subject("one JSONL file", "one.jsonl", f"{TRAIN} --task mood.yaml --data one.jsonl"),
    Subject("one JSON file", "one.json", f"{TRAIN} --task mood.yaml --data one.json"),
    Subject("one CSV file", "one.csv", f"{TRAIN} --task mood.yaml --data one.csv"),
    Subject("one TSV file", "one.tsv", f"{TRAIN} --task mood.yaml --data one.tsv"),
    Subject("one CoNLL file", "one.conll", f"{TRAIN} --task names.yaml --data one.conll"),
    Subject("labels of several classes", "about/*.jsonl", f"{TRAIN} --task about.yaml"),
    Subject("run config", "run.yaml", f"{TRAIN} --task mood.yaml --config run.yaml"),
    Subject("rules", "rules.yaml", "predict checkpoint --device cpu --route rules.yaml --json 'Ada met Mozart'"),
    Subject("lines to answer", "lines.txt", "predict checkpoint --device cpu --task mood --json --file lines.txt"),
    Subject("rows to answer", "rows.jsonl", "predict checkpoint --device cpu --task mood --json --file rows.jsonl"),
    Subject("data to score", "mood/test.jsonl", "evaluate checkpoint --device cpu --task mood --data mood"),
    Subject("backbone", "bert/*.json", "train --backbone bert --device cpu --output out --task mood.yaml"),
    Subject("PEFT folder", "peft/*", "import peft --backbone {bert} --output out"),
    Subject("checkpoint", "checkpoint/**/*", f"{PREDICT} --task all", is_checkpoint=True),
    Subject("manifest", "checkpoint/manifest.json", f"{PREDICT} --task all", is_checkpoint=True),
    Subject("gate's choice", "checkpoint/*.*", PREDICT, is_checkpoint=True),
    Subject("checkpoint to inspect", "checkpoint/**/*.*", "inspect checkpoint"),
    Subject("checkpoint to edit", "checkpoint/**/*.*", "edit checkpoint --remove mood --output out"),
    Subject("checkpoint to export", "checkpoint/**/*.*", "export checkpoint --format peft --task about --output out"),
)  # fmt: skip


def write_inputs(root: Path) -> tuple[Path, Path]:
    """Write the undamaged inputs of all subjects; return their folder, and that of an undamaged backbone."""
    folder = root / "inputs"
    _write_models(folder)
    bert = shutil.copytree(folder / "bert", root / "bert")
    for name in ("mood", "names", "about"):
        write_toy(folder, name, sizes=(12, 4, 4))
    rows = toy_rows("mood", 20)
    write_rows(folder / "one.jsonl", rows)
    (folder / "one.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for name, delimiter in (("one.csv", ","), ("one.tsv", "\t")):
        with (folder / name).open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
            table.writerows([("text", "label"), *((row["text"], row["label"]) for row in rows)])
    sentences = toy_rows("names", 20)
    blocks = ("".join(f"{w} {t}\n" for w, t in zip(row["tokens"], row["tags"], strict=True)) for row in sentences)
    (folder / "one.conll").write_text("\n".join(blocks), encoding="utf-8")
    run = {"train": {"batch_size": 4, "learning_rate": 0.01}, "gate": {"top_k": 1}, "experts": {"rank": 4}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    rules = [
        {"contains": ["Ada"], "expert": "names"},
        {"longer_than": 40, "expert": "mood"},
        {"metadata": {"source": "mail"}, "expert": "about"},
        {"otherwise": "mood"},
    ]
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (folder / "lines.txt").write_text("the weather loved\nboring\n\nAda\n", encoding="utf-8")
    write_rows(folder / "rows.jsonl", [{"text": "the weather loved"}, {"text": "boring", "tasks": ["mood"]}])
    return folder, bert


def _write_models(folder: Path) -> Path:
    """Write a backbone, a checkpoint and a LoRA of PEFT, all of random weights; return the backbone's folder."""
    bert = folder / "bert"
    save_tiny(bert, "bert")
    model = SparseExpertModel(load_backbone(str(bert)))
    for task, (level, num_outputs) in HEADS.items():
        add_random_expert(model, task)
        model.add_task(task, expert=task, level=level, num_outputs=num_outputs).initialise(seed=1, name=task)
    model.gate = SequenceGate(list(HEADS), 32, block=0, selection=Selection())
    for parameter in model.gate.parameters():
        parameter.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    save_model(folder, model.eval())
    peft = wrap(bert, task_type="SEQ_CLS", r=3, target_modules=["query", "dense"], num_labels=2)
    peft.save_pretrained(folder / "peft")
    (folder / "peft" / "README.md").unlink(missing_ok=True)
    AutoConfig.from_pretrained(bert, id2label=dict(enumerate(LABELS["mood"]))).save_pretrained(folder / "peft")
    return bert
