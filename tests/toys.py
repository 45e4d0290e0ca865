"""Toy tasks whose answer hangs on a few words, and what tests train and compare with them."""

import json
import logging
import random
import sys
from pathlib import Path

import safetensors.torch
import torch
import yaml

import sparse_ft
from sparse_ft.cli import main as cli_module
from sparse_ft.evaluation.token_routing import Token, TokenRouting

# Words of the corpus that conftest's tokenizers are built on: fillers, then one group an answer.
FILLERS = [
    "the",
    "first",
    "second",
    "half",
    "of",
    "table",
    "company",
    "weather",
    "analytical",
    "engine",
    "three",
    "and",
    "then",
    "at",
    "six",
]


GOOD, BAD = ["loved"], ["boring"]


PERSONS = [["Ada", "Lovelace"], ["Charles", "Babbage"], ["Mozart"]]


PLACES = [["London"], ["Lisbon"], ["Geneva"], ["Chelsea"]]


KINDS = {
    "mood": "classification",
    "reply": "classification",
    "about": "multi_label",
    "names": "token_classification",
}
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
    place = generator.randrange(len(words) + 1)
    if name == "mood":
        return {"text": " ".join([*words[:place], cue, *words[place:]]), "label": "good" if good else "bad"}
    if name == "reply":  # the first text never tells
        second = " ".join([*words[:place], cue, *words[place:]])
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


def trained_toys(tmp_path_factory, backbone: Path) -> Path:
    """Train all toy tasks into one checkpoint, once a session; nobody may change it."""
    folder = tmp_path_factory.getbasetemp() / f"toys-{backbone.name}"
    if (folder / "checkpoint").is_dir():
        return folder / "checkpoint"
    folder.mkdir()
    tasks = [write_toy(folder, name, sizes=(240, 32, 32)) for name in KINDS]
    options = {"train__epochs": 4, "train__batch_size": 8, "train__learning_rate": 0.005}
    return run(tasks, backbone, folder / "checkpoint", **options).path


def trained_minilm(tmp_path_factory) -> Path:
    """Train two toy tasks on the real MiniLM, once a session; nobody may change it."""
    folder = tmp_path_factory.getbasetemp() / "toys-minilm"
    if (folder / "checkpoint").is_dir():
        return folder / "checkpoint"
    folder.mkdir()
    tasks = [write_toy(folder, name, sizes=(48, 8, 24)) for name in ("mood", "names")]
    options = {"train__epochs": 3, "train__learning_rate": 0.004, "experts__first_block": 3}
    return run(tasks, "minilm", folder / "checkpoint", **options).path


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the experts and heads."""
    return {
        f"{file.relative_to(checkpoint).as_posix()}:{name}": tensor
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


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


# Three epochs of 5 steps, then three of 3 for the second task, and a save every second step; dropout makes every step
# depend on the random state.
OPTIONS = {
    "train__epochs": 3,
    "train__batch_size": 8,
    "train__save_steps": 2,
    "train__head_dropout": 0.2,
    "experts__dropout": 0.1,
    "train__patience": 9,
}


def assert_same_end(path: Path, expected: Path) -> None:
    files = sorted(file.relative_to(expected) for file in expected.rglob("*.safetensors"))
    assert files
    assert sorted(file.relative_to(path) for file in path.rglob("*.safetensors")) == files
    for file in files:
        assert (path / file).read_bytes() == (expected / file).read_bytes(), file
    assert json.loads((path / "metrics.json").read_text()) == json.loads((expected / "metrics.json").read_text())
    assert not (path / "resume").exists()
    assert not [entry.name for entry in path.iterdir() if entry.name.startswith(".")]


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


def routed(num_experts, num_blocks=3, *, texts=("[CLS]", "Ada", "上海", "[SEP]"), by_token=True, top_k=2, seed=0):
    """Make a routing with random weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_blocks, len(texts), num_experts, generator=generator)
    best, experts = scores.topk(min(top_k, num_experts))
    weights = torch.zeros_like(scores).scatter(-1, experts, (best * 3).softmax(-1))
    return TokenRouting(
        checkpoint="runs/all",
        route="arrow",
        text=" ".join(texts),
        tokens=[Token(text, 0, len(text)) for text in texts],
        truncated=False,
        experts=[f"expert_{place}" for place in range(num_experts)],
        blocks=list(range(1, num_blocks + 1)),
        weights=weights if by_token else weights[:1, :1].expand(num_blocks, len(texts), -1),
        by_token=by_token,
    )


def add_random_expert(model, name, *, first_block=0, targets=None, rank=4, alpha=8.0, seed=1):
    """Add an expert that changes what the backbone says, by about a tenth."""
    modules = model.backbone.select_linears(first_block=first_block, targets=targets)
    model.experts.create(name, modules=modules, rank=rank, alpha=alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.experts.parameters(name).items():
        if key.endswith("lora_B") and parameter.numel():
            parameter.data.normal_(0.0, 0.1, generator=generator)


def trainable_of(model, task):
    """What learns from a task: its experts' deltas and its head, by name."""
    found = {f"head.{name}": value for name, value in model.head(task).named_parameters()}
    used = model.tasks[task].used
    for expert in used:
        prefix = "expert." if len(used) == 1 else f"expert.{expert}."
        found.update({f"{prefix}{name}": value for name, value in model.experts.parameters(expert).items()})
    return {name: parameter for name, parameter in found.items() if parameter.numel()}
