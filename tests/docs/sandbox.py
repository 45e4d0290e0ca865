"""A folder with the data and checkpoints that the snippets of the documentation name, all of them tiny."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from snippets import ROOT, blocks

import sparse_ft
from sparse_ft.cli.main import app

SETTINGS = [
    "train.epochs=1", "train.min_steps=0", "train.batch_size=16", "train.precision=fp32", "data.max_length=48",
]  # fmt: skip
FIRST = (["train", "--config", "bundled4", "--output", "runs/all"], ["train", "--task", "ner"])
"""Commands of several pages whose checkpoints others read: they run before all pages, and not again."""
_QUICK_GATE = "gate.type=prototype"  # in closed form


def shortened(words: list[str]) -> list[str]:
    """Make a command take a second: few rows, a tiny backbone, two trials."""
    words = list(words)
    if "--budget" in words:
        words[words.index("--budget") + 1] = "2"
        words += ["--rows", "8"]
    if words[0] == "distill":
        words += [word for setting in [*SETTINGS, _QUICK_GATE] for word in ("--set", setting)]
    if words[0] == "train":
        settings = [] if "gate" in words else list(SETTINGS)  # the gate alone has no settings of the loop
        if not {"joint", "--from"} & set(words) and not {"gate.type", "experts.pool"} & _settings(words):
            settings.append(_QUICK_GATE)
        words += [word for setting in settings for word in ("--set", setting)]
        if not {"--from", "--backbone"} & set(words):
            words += ["--backbone", "my_backbone"]
    return words


def _settings(words: list[str]) -> set[str]:
    """Return the names of the settings that a command changes."""
    return {word.partition("=")[0] for word in words if "=" in word}


def make_room(words: list[str]) -> None:
    """Remove the output of a command if an earlier one has written it."""
    if "--output" in words:
        shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)


def train(*tasks: str, output: str, **options: object) -> None:
    """Train a tiny checkpoint of the sandbox."""
    sparse_ft.train(
        tasks, output=output, backbone="my_backbone", overrides=[*SETTINGS, _QUICK_GATE], device="cpu", **options
    )


def write_inputs(folder: Path) -> None:
    """Write the files that snippets read."""
    replies = [("Where is my parcel?", "shipping"), ("My card was charged twice.", "billing"), ("It broke.", "repairs")]
    rows = [f"{text.rstrip('?.')} {number}.,{label}" for number in range(20) for text, label in replies]
    table = "\n".join(["message,queue", *rows]) + "\n"
    (folder / "messages").mkdir()
    for name in ("messages.csv", "messages/train.csv", "messages/dev.csv", "messages/test.csv"):
        (folder / name).write_text(table, encoding="utf-8")
    (folder / "my_rows.csv").write_text(table.replace("message,queue", "text,label"), encoding="utf-8")
    task = "name: my_task\nkind: classification\nfiles: {format: csv}\nmetric: accuracy\n"
    (folder / "my_task.yaml").write_text(task, encoding="utf-8")
    moods = [{"text": f"It was {word} {number}.", "label": label} for number in range(12)
             for word, label in (("lovely", "positive"), ("dull", "negative"))]  # fmt: skip
    for name in ("mood", "sst2"):
        write = (folder / f"{name}.jsonl").write_text
        write("".join(json.dumps(row) + "\n" for row in moods), encoding="utf-8")
        task = f"name: {name}\nkind: classification\nfiles: {{format: jsonl}}\nmetric: accuracy\n"
        (folder / f"{name}.yaml").write_text(task + "labels: [negative, positive]\n", encoding="utf-8")
    sentence = "Ada NNP B-NP B-PER\nmet VBD B-VP O\nMozart NNP B-NP B-PER\nin IN B-PP O\nLondon NNP B-NP B-LOC\n\n"
    (folder / "DATA/conll2003").mkdir(parents=True)
    for name in ("train.txt", "valid.txt", "test.txt"):
        (folder / "DATA/conll2003" / name).write_text(sentence * 12, encoding="utf-8")
    (rules,) = (block.text for block in blocks(ROOT / "docs/how-to/rules.md") if block.language == "yaml")
    (folder / "rules.yaml").write_text(rules, encoding="utf-8")
    (folder / "texts.txt").write_text("The soup was cold.\nParliament meets in Oslo.\n", encoding="utf-8")
    mails = [
        {"text": "Hello!", "metadata": {"channel": "mail"}},
        {"text": "Ship it to Leeds", "tasks": ["ner"]},
        {"text": "Wo ist mein Paket?", "metadata": {"language": "de"}},
        {"text": "Order AB12: refund my parcel"},
    ]
    (folder / "mails.csv").write_text("id,text\n7,The soup was cold.\n8,Book a table in Lisbon.\n", encoding="utf-8")
    (folder / "mails.jsonl").write_text("".join(json.dumps(mail) + "\n" for mail in mails), encoding="utf-8")


def write_bundled(folder: Path, choose: Callable[[list[str]], list[str]] = lambda rows: rows[:16]) -> None:
    """Write the bundled tasks and configs with some rows of each sample, as they lie beside the package."""
    for kind in ("tasks", "configs"):
        shutil.copytree(ROOT / kind, folder / kind)
    for path in (folder / "tasks/data").glob("*/*.*"):
        between = "\n\n" if path.suffix == ".txt" else "\n"
        header, rows = [], path.read_text(encoding="utf-8").rstrip("\n").split(between)
        if path.suffix == ".tsv":
            header, rows = rows[:1], rows[1:]
        path.write_text(between.join([*header, *choose(rows)]) + "\n", encoding="utf-8")


def write_peft_folder(folder: Path) -> None:
    """Write a token classifier's LoRA as PEFT saves it."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained("my_backbone", num_labels=3)
    config = LoraConfig(task_type=TaskType.TOKEN_CLS, target_modules=["query", "value"])
    get_peft_model(model, config).save_pretrained(folder)


def write_backbone(source: Path, folder: Path) -> None:
    """Write a BERT of four tiny blocks with the tokenizer of ``source``."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(source, num_hidden_layers=4)).save_pretrained(folder)


def write_checkpoints() -> None:
    """Train the checkpoints that snippets name and no earlier page writes; some are copies of others."""
    for words in FIRST:
        app(args=shortened(words), prog_name="sparse-ft", standalone_mode=False)
    for task in ("intent", "sentiment"):
        train(task, output=f"runs/{task}")
    train("./sst2.yaml", output="runs/sst2", data="sst2.jsonl")
    train("./mood.yaml", output="runs/a", data="mood.jsonl")
    train("sentiment", "./mood.yaml", output="runs/moods", data={"mood": "mood.jsonl"})
    train("conll2003", output="runs/conll2003", data="DATA/conll2003")
    for source, copy in (("all", "four"), ("sentiment", "new"), ("a", "b")):
        shutil.copytree(f"runs/{source}", f"runs/{copy}")
