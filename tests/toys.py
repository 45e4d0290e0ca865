"""Toy tasks whose answer hangs on a few words, and what tests train and compare with them."""

import json
import logging
import random
import sys
from pathlib import Path

import yaml

import sparse_ft
from sparse_ft.cli import main as cli_module

# Words of the corpus that conftest's tokenizers are built on: fillers, then one group an answer.
FILLERS = [
    "the", "first", "second", "half", "of", "table", "company", "weather", "analytical", "engine", "three", "and",
    "then", "at", "six",
]  # fmt: skip
GOOD, BAD = ["loved"], ["boring"]
PERSONS = [["Ada", "Lovelace"], ["Charles", "Babbage"], ["Mozart"]]
PLACES = [["London"], ["Lisbon"], ["Geneva"], ["Chelsea"]]
KINDS = {"mood": "classification", "reply": "classification", "about": "multi_label", "names": "token_classification"}
"""The toy tasks; ``reply`` is one on pairs."""
COLUMNS = {
    "mood": {"text": "text", "label": "label"},
    "reply": {"text": "text", "text_pair": "text_pair", "label": "label"},
    "about": {"text": "text", "labels": "labels"},
    "names": {"tokens": "tokens", "tags": "tags"},
}
EXAMPLES = {"mood": "the weather loved", "reply": "the table\tthe film", "names": "Ada met Mozart in Lisbon"}


def toy_row(name: str, generator: random.Random) -> dict:
    """Make one row of a toy task."""
    words = generator.choices(FILLERS, k=generator.randint(2, 5))
    good = generator.random() < 0.5
    cue = generator.choice(GOOD if good else BAD)
    index = generator.randrange(len(words) + 1)
    if name == "mood":
        return {"text": " ".join([*words[:index], cue, *words[index:]]), "label": "good" if good else "bad"}
    if name == "reply":  # the first text never tells
        second = " ".join([*words[:index], cue, *words[index:]])
        return {"text": " ".join(generator.choices(FILLERS, k=2)), "text_pair": second, "label": "yn"[not good]}
    if name == "about":
        labels = [label for label in ("music", "football") if generator.random() < 0.5]
        for label in labels:
            words.insert(generator.randrange(len(words) + 1), label)
        return {"text": " ".join(words), "labels": labels}
    tags = ["O"] * len(words)
    for entity_type, entities in (("PER", PERSONS), ("LOC", PLACES)):
        free = [spot for spot in range(len(words) + 1) if spot == len(words) or not tags[spot].startswith("I")]
        spot, entity = generator.choice(free), generator.choice(entities)
        words[spot:spot] = entity
        tags[spot:spot] = [f"B-{entity_type}"] + [f"I-{entity_type}"] * (len(entity) - 1)
    return {"tokens": words, "tags": tags}


def toy_rows(name: str, number: int, *, seed: int = 0) -> list[dict]:
    generator = random.Random(f"{name}/{seed}")
    return [toy_row(name, generator) for _ in range(number)]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_toy(folder: Path, name: str, *, sizes: tuple = (96, 32, 32), as_name: str = "", **changes) -> str:
    """Write a toy task with its data; return the path of its task file."""
    called = as_name or name
    for seed, (split, size) in enumerate(zip(("train", "validation", "test"), sizes, strict=True)):
        write_rows(folder / called / f"{split}.jsonl", toy_rows(name, size, seed=seed))
    files = {
        "format": "jsonl",
        "root": called,
        **{split: f"{split}.jsonl" for split in ("train", "validation", "test")},
    }
    content = {
        "name": called,
        "kind": KINDS[name],
        "files": files,
        "columns": COLUMNS[name],
        "metric": "f1" if name == "names" else "accuracy",
        "example": EXAMPLES.get(name, ""),
    }
    path = folder / f"{called}.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False), encoding="utf-8")
    return str(path)


def settings(**changes) -> list[str]:
    """Overrides for a run of seconds; a double underscore stands for the dot."""
    values = {
        "train__epochs": 2,
        "train__min_steps": 0,
        "train__batch_size": 16,
        "train__learning_rate": 0.01,
        "train__precision": "fp32",
        "train__patience": 0,
        "train__head_dropout": 0.0,
    }
    return [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in {**values, **changes}.items()]


def run(tasks: list[str], backbone: str | Path | None, output: Path | None, *, seed: int | None = None, **changes):
    """Train on the CPU with ``settings(**changes)``."""
    return sparse_ft.train(
        tasks,
        backbone=None if backbone is None else str(backbone),
        output=output,
        overrides=settings(**changes),
        device="cpu",
        seed=seed,
    )


# Words that tell the tasks apart, so that a gate has something to learn.
MARKS = {
    "mood": ("Book for two tomorrow please " * 3).split(),
    "names": ("Shares fell per cent after profits " * 3).split(),
}


def marked(folder, name, *, sizes=(60, 16, 16), **changes):
    """Write a toy task whose texts begin with words of their own."""
    path = write_toy(folder, name, sizes=sizes, **changes)
    for seed, (split, size) in enumerate(zip(("train", "validation", "test"), sizes, strict=True)):
        rows = toy_rows(name, size, seed=seed)
        for row in rows:
            if "text" in row:
                row["text"] = " ".join([*MARKS[name], row["text"]])
            else:
                row["tokens"], row["tags"] = [*MARKS[name], *row["tokens"]], ["O"] * len(MARKS[name]) + row["tags"]
        write_rows(folder / name / f"{split}.jsonl", rows)
    return path


POOL = {"experts__pool": 4, "experts__shared": True, "experts__shared_a": True}


# Two epochs of 5 steps, then two of 3 for the second task, and a save every second step; dropout makes every step
# depend on the random state.
OPTIONS = {
    "train__epochs": 2,
    "train__batch_size": 8,
    "train__save_steps": 2,
    "train__head_dropout": 0.2,
    "experts__dropout": 0.1,
    "train__patience": 9,
}


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["sparse-ft", *map(str, arguments)])
    logger = logging.getLogger("sparse_ft")
    handlers, level = list(logger.handlers), logger.level
    capsys.readouterr()
    code = 0
    try:
        cli_module.main()
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        logger.handlers, logger.level = handlers, level
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def quick(**changes) -> list[str]:
    options = settings(**{"train__epochs": 1, **changes})
    return [*(part for option in options for part in ("--set", option)), "--device", "cpu"]


def train_joint(tasks, backbone, output, *, start=None, seed=None, data=None, **changes):
    """Train jointly on the CPU, in one thread, with ``settings(**changes)``."""
    return sparse_ft.train(
        tasks,
        data=data,
        backbone=None if backbone is None else str(backbone),
        output=output,
        overrides=settings(**{"train__workers": 1, **changes}),
        device="cpu",
        seed=seed,
        stage="joint",
        from_checkpoint=start,
    )


JOINT = {"token": {"gate__type": "token", **POOL}, "sequence": {}}
"""By token among a pool with a shared expert and one A; by text among the tasks' own experts."""
SINGLE = ["mood", "about", "names"]
"""The toy tasks that read one text."""
ODD_TEXTS = [
    "",
    " ",
    "\n\t\n",
    "Ada Lovelace in London",
    "👩‍👩‍👧 Ada 😀 in 🇵🇹 Lisbon!",
    "Ada e\u0301te\u0301 a\u0308 in Geneva, n\u0303.",
    "Ａｄａ　ｉｎ　Ｌｏｎｄｏｎ。",
    "Ada\tLovelace\r\n  in\n\nLondon \u2028 at\u00a0six",
    "我们在上海住了三年 with Mozart",
    "Ada's don't U.S. 3.5 mother-in-law (London)...",
    "\u200bAda\ufeff Mozart\u0000 in\x07 London",
    "\U0001d400\U0001d41d\U0001d41a met Mozart",
]


def varied_texts(number: int) -> list[str]:
    generator = random.Random(3)
    texts = [" ".join(row["tokens"]) for row in toy_rows("names", number, seed=5)]
    lengths = [generator.choice([0, 1, 5, 40, 200]) for _ in texts]
    longer = [
        " ".join([text, *generator.choices(FILLERS, k=length)]) for text, length in zip(texts, lengths, strict=True)
    ]
    return [*longer, *ODD_TEXTS]
