"""Checkpoints for tests: trained once a run or saved with random weights, and what is compared with them."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from filelock import FileLock
from toys import JOINT, KINDS, SINGLE, run, train_joint, write_toy

import sparse_ft
from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.backbone.words import split_words
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.inventory import list_files
from sparse_ft.config import RunConfig
from sparse_ft.evaluation.token_routing import Token, TokenRouting
from sparse_ft.experts.gates import Selection, SequenceGate, TokenGate
from sparse_ft.experts.inference import row_logits
from sparse_ft.experts.named_experts import Expert
from sparse_ft.prediction.loaded_model import Prediction
from sparse_ft.prediction.routes import Route
from sparse_ft.tasks.spec import load_task


def once(shared: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the checkpoint that ``make`` writes to a folder, made once for all processes of a test run; read-only."""
    folder = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not (folder / "checkpoint" / "manifest.json").is_file():
            folder.mkdir(exist_ok=True)
            make(folder)
    return folder / "checkpoint"


def train_toys(folder: Path, backbone: Path) -> None:
    """Train all toy tasks into one checkpoint."""
    tasks = [write_toy(folder, name, sizes=(160, 32, 32)) for name in KINDS]
    options = {"train__epochs": 5, "train__batch_size": 8, "train__learning_rate": 0.008}
    run(tasks, backbone, folder / "checkpoint", **options)


def train_minilm_toys(folder: Path) -> None:
    """Train two toy tasks on the real MiniLM."""
    tasks = [write_toy(folder, name, sizes=(48, 8, 16)) for name in ("mood", "names")]
    options = {"train__epochs": 3, "train__learning_rate": 0.004, "experts__first_block": 3}
    run(tasks, "minilm", folder / "checkpoint", **options)


def train_joint_toys(folder: Path, backbone: Path, kind: str) -> None:
    """Train the toy tasks on single texts jointly."""
    tasks = [write_toy(folder, name, sizes=(120, 32, 48)) for name in SINGLE]
    options = {"train__epochs": 4, "train__batch_size": 12, "train__learning_rate": 0.01}
    train_joint(tasks, backbone, folder / "checkpoint", **options, **JOINT[kind])


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the experts and heads."""
    return {
        f"{file.relative_to(checkpoint).as_posix()}:{name}": tensor
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def sign(checkpoint: Path, **changes) -> Path:
    """Let the manifest list the files that are there now, as whoever forges a checkpoint would; change its entries."""
    file = checkpoint / "manifest.json"
    files = {part.relative_to(checkpoint).as_posix(): part.read_bytes() for part in list_files(checkpoint)}
    sizes = {name: len(content) for name, content in files.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    file.write_text(json.dumps({**json.loads(file.read_text()), "bytes": sizes, "sha256": hashes, **changes}))
    return checkpoint


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_same_end(path: Path, expected: Path) -> None:
    files = sorted(file.relative_to(expected) for file in expected.rglob("*.safetensors"))
    assert files
    assert sorted(file.relative_to(path) for file in path.rglob("*.safetensors")) == files
    for file in files:
        assert (path / file).read_bytes() == (expected / file).read_bytes(), file
    assert json.loads((path / "metrics.json").read_text()) == json.loads((expected / "metrics.json").read_text())
    assert not (path / "resume").exists()
    assert not [entry.name for entry in path.iterdir() if entry.name.startswith(".")]


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
        experts=[f"expert_{index}" for index in range(num_experts)],
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
    trainable = {f"head.{name}": value for name, value in model.head(task).named_parameters()}
    used = model.tasks[task].used
    for expert in used:
        prefix = "expert." if len(used) == 1 else f"expert.{expert}."
        trainable.update({f"{prefix}{name}": value for name, value in model.experts.parameters(expert).items()})
    return {name: parameter for name, parameter in trainable.items() if parameter.numel()}


# Of `saved`.
LABELS = {"mood": ["bad", "good"], "reply": ["no", "yes"], "about": ["football", "music"], "names": ["PER", "LOC"]}
HEADS = {"mood": ("text", 2), "about": ("text", 2), "names": ("word", 5)}


def saved(folder, make_model, family, *, heads=HEADS, seed=1, config=None, pooling="auto", gate=False) -> Path:
    """Write a checkpoint of random experts in different blocks, without training; the tagger sees word shapes."""
    lowest = {name: index for index, name in enumerate(HEADS)}
    model = make_model(family, heads, first_block=lowest, rank={"mood": 4, "about": 8, "names": 6}, pooling=pooling)
    if "names" in heads:
        tagger = model.experts.get("names")
        shapes = torch.randn(9, 32, generator=torch.Generator().manual_seed(seed))
        model.experts.replace(Expert("names", tagger.alpha, tagger.deltas, shapes))
    for name in heads:  # other numbers for another seed
        for parameter in model.experts.parameters(name).values():
            parameter.data.mul_(seed)
    if gate:
        model.gate = SequenceGate(list(heads), 32, block=0, selection=Selection())
    return save_model(folder, model, config=config)


def save_model(folder, model, *, config=None) -> Path:
    """Write a checkpoint of a model in memory, with toy tasks of a few rows."""
    heads = list(model.tasks)
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: load_task(write_toy(folder, name, sizes=(4, 2, 2), labels=LABELS[name])) for name in heads}
    metrics = {name: {"validation": 0.5 + index / 10} for index, name in enumerate(heads)}
    if model.gate is not None:
        metrics["names"]["routing_accuracy"] = 0.99
    sources = {name: str(folder / name) for name in heads}
    config = config or RunConfig(sources=sources)
    save_checkpoint(folder / "checkpoint", model=model, tasks=specs, config=config, metrics=metrics)
    return folder / "checkpoint"


def logits(checkpoint, *tasks):
    """Logits of each task alone and of all tasks in one batch."""
    model = (load_checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint).model
    return all_logits(model, list(tasks))


def saved_joint(kind, folder, make_model):
    """A checkpoint of two mixed tasks with a shared expert, and of one task that has an expert of its own."""
    path = saved(folder, make_model, "bert")
    loaded = load_checkpoint(path)
    model = loaded.model
    add_random_expert(model, "common", rank=3, seed=3)
    for name in ("mood", "about"):
        model.tasks[name] = replace(model.tasks[name], joint=True, shared="common")
    names, generator = ["mood", "about"], torch.Generator().manual_seed(2)
    gate = (
        TokenGate(names, 32, blocks=[0, 1, 2], selection=Selection(top_k=2))
        if kind == "token"
        else SequenceGate(names, 32, block=1, selection=Selection(top_k=2))
    )
    for parameter in gate.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    model.gate = gate.requires_grad_(False).eval()
    target = folder / "mixed"
    save_checkpoint(target, model=model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics)
    return target


def answers(path, *tasks):
    """Logits of some tasks of a checkpoint, or of all, by task."""
    model = sparse_ft.load(path, device="cpu")
    texts = ["The quick brown fox", "Ada Lovelace met Charles Babbage in London", ""]
    logits = {name: model.logits(texts, name) for name in tasks or model.tasks}
    return {name: rows if isinstance(rows, torch.Tensor) else torch.cat(rows) for name, rows in logits.items()}


def disk(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def batch_of(model, tasks):
    """Rows of the given tasks, padded."""
    encoder = Encoder(model.backbone, max_length=64)
    rows = []
    for task in tasks:
        texts = ["The quick brown fox", "Ada Lovelace met Charles Babbage in London in spring", "well"]
        if model.tasks[task].level == "word":
            rows += [(task, example) for example in encoder.words([text.split() for text in texts])]
        else:
            rows += [(task, example) for example in encoder.texts(texts)]
    return collate(rows, pad_id=model.backbone.pad_id)


def all_logits(model, tasks, *, grad=False):
    """The logits of each task alone, and of all tasks in one batch."""
    with torch.set_grad_enabled(grad):
        alone = {f"{task} alone": model(batch_of(model, [task]))[task] for task in tasks}
        return alone | {f"{task} together": logits for task, logits in model(batch_of(model, tasks)).items()}


def assert_bit_identical(before, after):
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


def assert_same(answers: list[Prediction], expected: list[Prediction]) -> None:
    """The same labels and entities; scores may differ in the last bits, as batches are padded differently."""
    for one, other in zip(answers, expected, strict=True):
        left, right = copy.deepcopy(one.to_dict()), copy.deepcopy(other.to_dict())
        assert left.pop("routing") == pytest.approx(right.pop("routing"), abs=1e-5)
        scores = [take_scores(left), take_scores(right)]
        assert left == right
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def take_scores(value) -> list[float]:
    if isinstance(value, dict):
        own = [value.pop("score")] if "score" in value else []
        return own + [score for item in value.values() for score in take_scores(item)]
    return [score for item in value for score in take_scores(item)] if isinstance(value, list) else []


def passes(model, call) -> int:
    """Count how often a call runs the backbone, whole or in part."""
    count = []
    handle = model.checkpoint.model.encoder.register_forward_pre_hook(lambda *_: count.append(1))
    call()
    handle.remove()
    return len(count)


def logits_of(model, task: str, texts: list[str]) -> list[torch.Tensor]:
    """Compute logits of single texts or of words without the code of prediction.py."""
    encoder = Encoder(model.backbone, max_length=256)
    words, parts = [text.split() for text in texts], None
    if model.tasks[task].level == "word":
        examples, parts = encoder.words(words), [len(row) for row in words]
    else:
        examples = encoder.texts(texts)
    route = Route("task", model)
    routing = None if route.block_gate(task) else route.rows(examples, task=task)
    return row_logits(model, task, examples, num_rows=len(texts), num_parts=parts, routing=routing)


def wrap(folder, *, auto="AutoModelForSequenceClassification", task_type="SEQ_CLS", num_labels=None, **settings):
    """Put a random LoRA of PEFT on a model of transformers."""
    import transformers
    from peft import LoraConfig, get_peft_model

    labels = {} if num_labels is None else {"num_labels": num_labels}
    base = getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager", **labels)
    model = get_peft_model(base, LoraConfig(task_type=task_type, **settings))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.eval()


TEXTS = ["The quick brown fox.", "x", "Ada Lovelace met Mozart in London, 1996-08-22 🙂", "no no no no no no no no"]


def without_shapes(folder, make_model, family, **settings):
    """A checkpoint whose tagger does not see how words are written; written once more over that of ``saved``."""
    path = saved(folder, make_model, family, heads={name: HEADS[name] for name in ("mood", "names")}, **settings)
    loaded = load_checkpoint(path)
    tagger = loaded.model.experts.get("names")
    loaded.model.experts.replace(Expert("names", tagger.alpha, tagger.deltas))
    save_checkpoint(path, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics)
    return path


def word_logits(logits, encoded, rows, *, last):
    """The logits that stand for each word of each row."""
    chosen = []
    for index, row in enumerate(rows):
        ids = encoded.word_ids(index)
        pieces = [[at for at, word in enumerate(ids) if word == number] for number in range(len(row))]
        chosen.append(logits[index, [piece[-1 if last else 0] for piece in pieces]])
    return chosen


def words_of(texts):
    return [[word.text for word in split_words(text)] for text in texts]


def assert_close(ours, theirs):
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.as_tensor(right), left, atol=5e-5, rtol=1e-5)


class Interrupted(BaseException):
    pass


def interrupt(*, after: int, start) -> None:
    """Stop a run of this process after some steps."""
    from sparse_ft.training import loop as fitting

    step, count = fitting._Loop.step, 0

    def stopping(self, pairs):
        nonlocal count
        step(self, pairs)
        count += 1
        if count == after:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting._Loop, "step", stopping)
        with pytest.raises(Interrupted):
            start()


def counted_blocks(model, call):
    """Call, and return the result and the number of rows that ran through each block."""
    rows = [0] * model.backbone.num_blocks

    def hook(index):
        def count(module, args, kwargs):
            rows[index] += len(args[0] if args else kwargs["hidden_states"])

        return count

    # The slot replaces forward, so hooks see what comes in; the last part of a block sees what it computes.
    handles = []
    for index, block in enumerate(model.backbone.blocks):
        inner = [module for module in block.modules() if isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm)]
        inner = inner or [module for module in block.modules() if "RMSNorm" in type(module).__name__]
        handles.append(inner[0].register_forward_pre_hook(hook(index), with_kwargs=True))
    try:
        with torch.no_grad():
            return call(), rows
    finally:
        for handle in handles:
            handle.remove()
