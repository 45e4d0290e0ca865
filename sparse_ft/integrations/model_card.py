"""The README.md of an export: what the task is, how well the checkpoint does it, and how to run the files."""

from collections.abc import Sequence
from typing import Any

from sparse_ft.backbone.words import split_words
from sparse_ft.integrations.exporters.parts import any_shapes, empty_classifier, sees_shapes, sole_expert
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.kinds import find_kind

_MANY = 60

_PEFT = """from peft import AutoPeftModelForTokenClassification
from transformers import AutoTokenizer

model = AutoPeftModelForTokenClassification.from_pretrained("{folder}", num_labels={labels}).eval()
tokenizer = AutoTokenizer.from_pretrained("{folder}")
batch = tokenizer({example}, truncation=True, return_tensors="pt")
{logits}"""

_PEFT_WORDS = "logits = model(**batch).logits[0]  # one row a token"

_PEFT_TEXT = """classifier = model.get_base_model()
tokens = classifier.base_model(**batch).last_hidden_state
{pool}
logits = classifier.{head}(texts)  # one row a text"""

_MEAN = """real = batch["attention_mask"].unsqueeze(-1)
texts = (tokens * real).sum(1) / real.sum(1)"""
_POOL = {
    "unit": f"{_MEAN}\ntexts = texts / texts.square().mean(-1, keepdim=True).sqrt()",
    "mean": _MEAN,
    "first": "texts = tokens[:, 0]",
    "last": 'texts = tokens[list(range(len(tokens))), batch["attention_mask"].sum(1) - 1]',
}
"""By the pooling of the checkpoint."""

_TEXTS = """from transformers import pipeline

classify = pipeline("text-classification", model="{folder}", trust_remote_code=True)
classify({example}, truncation=True{more}"""

_WORDS = """from transformers import pipeline

tag = pipeline("token-classification", model="{folder}"{trust})
tag({example}, is_split_into_words=True)"""

_ONNX = """import json
{imports}
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tasks = json.load(open("{folder}/tasks.json"))  # inputs and outputs, labels, experts
session = onnxruntime.InferenceSession("{folder}/model.onnx")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
rows = [{example}]
batch = tokenizer(rows, {words}truncation=True, padding=True, return_tensors="np")
feed = {{name: batch[name] for name in batch if name in tasks["inputs"]}}
{shapes}{expert}(logits,) = session.run(["{task}"], feed)  # {logits}"""

_WORD_SHAPE = """import sys

sys.path.append("{folder}")
from words import word_shape
"""

_SHAPES_OF_WORDS = """feed["word_shapes"] = np.array([
    [0 if word is None else word_shape(rows[row][word]) for word in batch.word_ids(row)] for row in range(len(rows))
])  # how the word of each token is written
"""

_NO_SHAPES = """feed["word_shapes"] = np.zeros_like(feed["input_ids"])  # for tasks that tag words
"""

_EXPERT = """feed["expert"] = np.full(len(rows), tasks["tasks"]["{task}"]["expert"])  # of the task that each row is for
"""


def model_card(model: LoadedModel, tasks: Sequence[str], *, format: str, folder: str) -> str:
    """Write the card of an export.

    Args:
        model: The checkpoint.
        tasks: That the export answers.
        format: A key of EXPORTERS.
        folder: Its name.
    """
    backbone = model.checkpoint.model.backbone.name
    parts = [
        f"# {', '.join(tasks)}",
        f"Exported by sparse-ft in the format `{format}`, from an expert of low rank on the frozen backbone "
        f"`{backbone}`. `export.json` says how far its logits are from those of the checkpoint.",
        f"```python\n{_use(model, tasks, format=format, folder=folder)}\n```",
        *_remarks(model, tasks, format=format),
        *(_about(model, task) for task in tasks),
    ]
    return "\n\n".join(parts) + "\n"


def _use(model: LoadedModel, tasks: Sequence[str], *, format: str, folder: str) -> str:
    spec = model.tasks[tasks[0]]
    words = find_kind(spec.kind).level == "word"
    text, _, second = (spec.example or "Your text here.").partition("\t")
    pair, split = spec.reads == "pair", [word.text for word in split_words(text, spec.language)]
    if format == "onnx":
        return _use_onnx(model, tasks, folder=folder, row=split if words else (text, second) if pair else text)
    if format == "peft":
        labels = len(find_kind(spec.kind).outputs(spec.label_names or []))
        example = f"{text!r}, {second!r}" if pair else repr(text)
        return _PEFT.format(folder=folder, labels=labels, example=example, logits=_peft_logits(model, tasks[0]))
    if words:
        trust = ", trust_remote_code=True" if sees_shapes(model, tasks[0]) else ""
        return _WORDS.format(folder=folder, trust=trust, example=repr(split))
    more = ", top_k=None)  # a label holds from a score of 0.5" if spec.kind == "multi_label" else ")"
    example = repr({"text": text, "text_pair": second}) if pair else repr(text)
    return _TEXTS.format(folder=folder, example=example, more=more)


def _peft_logits(model: LoadedModel, task: str) -> str:
    inner, spec = model.checkpoint.model, model.tasks[task]
    if find_kind(spec.kind).level == "word":
        return _PEFT_WORDS
    return _PEFT_TEXT.format(head=empty_classifier(inner.backbone.config).head, pool=_POOL[inner.pooling])


def _use_onnx(model: LoadedModel, tasks: Sequence[str], *, folder: str, row: Any) -> str:
    task = tasks[0]
    shaped, several = any_shapes(model, tasks), len({sole_expert(model, name).name for name in tasks}) > 1
    words = find_kind(model.tasks[task].kind).level == "word"
    return _ONNX.format(
        folder=folder,
        task=task,
        example=repr(row),
        words="is_split_into_words=True, " if words else "",
        imports=_WORD_SHAPE.format(folder=folder) if shaped and words else "",
        shapes=(_SHAPES_OF_WORDS if words else _NO_SHAPES) if shaped else "",
        expert=_EXPERT.format(task=task) if several else "",
        logits="[rows, tokens, tags]" if words else "[rows, labels]",
    )


def _remarks(model: LoadedModel, tasks: Sequence[str], *, format: str) -> list[str]:
    """Say where the answers are not those of the checkpoint, or why the code is as it is."""
    remarks = []
    kinds = {find_kind(model.tasks[task].kind).level for task in tasks}
    if "word" in kinds:
        piece = "last" if model.encoder.last_piece else "first"
        remarks.append(
            f"The tag of a word is that of its {piece} piece. The checkpoint takes the most probable sequence of legal "
            "tags (an `I-` follows a tag of its own type) and reads long texts in windows; here it is the best tag of "
            f"each word by itself, in rows of at most {model.encoder.max_length} tokens."
        )
    if "text" in kinds and format == "peft":
        remarks.append(
            "No text classifier of transformers has a linear head over this pooling, so backbone and head come in a "
            "token classifier, and the code above pools between the two."
        )
    if "text" in kinds and format == "transformers":
        remarks.append(
            "No text classifier of transformers has a linear head over this pooling, so the folder brings "
            "`modeling_pooled.py`, which transformers runs with `trust_remote_code=True`; it is 30 lines."
        )
    if "word" in kinds and format == "transformers" and sees_shapes(model, tasks[0]):
        remarks.append(
            "The expert sees how a word is written, which no stock tokenizer says. So the folder brings its own "
            "tokenizer and model (`tokenization_shaped.py`, `words.py`, `modeling_shaped.py`), which transformers runs "
            "with `trust_remote_code=True`."
        )
    if model.checkpoint.model.gate is not None:
        remarks.append("The gate of the checkpoint, which chooses an expert for a text, is not in here.")
    return remarks


def _about(model: LoadedModel, task: str) -> str:
    spec, scores = model.tasks[task], model.checkpoint.metrics.get(task, {})
    labels = spec.label_names or []
    shown = ", ".join(labels[:_MANY]) + (f", … ({len(labels)} in all)" if len(labels) > _MANY else "")
    lines = [f"## {task}", spec.description, f"Kind: {spec.kind}. Language: {spec.language}. Labels: {shown}."]
    if spec.license or spec.source:
        lines.append(" ".join(f"{name}: {value}." for name, value in _origin(spec) if value))
    metrics: dict[str, Any] = scores.get("metrics", {})
    if metrics:
        named = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        lines.append(f"Scores of the checkpoint on {scores['split']} ({scores['n']} rows): {named}.")
    return "\n\n".join(line for line in lines if line)


def _origin(spec: Any) -> tuple[tuple[str, str], ...]:
    return (("Data", spec.source.rstrip(".")), ("Licence of the data", spec.license.rstrip(".")))
