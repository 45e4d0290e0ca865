"""The parts of a checkpoint that every format needs: one expert, the tokenizer, and transformers' token classifier."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_ft.backbone.backbone import Backbone, fresh_tokenizer, load_backbone
from sparse_ft.backbone.words import SHAPES
from sparse_ft.checkpoint.foreign_adapters import LINEAR_HEADS
from sparse_ft.errors import ExportError
from sparse_ft.experts.named_experts import Expert, sum_of_experts
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.kinds import find_kind


class TokenClassifier(NamedTuple):
    """The token classifier that transformers has for a backbone."""

    model: nn.Module
    prefix: str
    """Name of the backbone in it, e.g. ``bert``."""
    head: str
    """Name of the linear on its hidden states, e.g. ``classifier``."""


def sole_expert(model: LoadedModel, task: str) -> Expert:
    """Return the one expert that answers a task, for formats whose tasks on texts read them whole.

    Raises:
        ExportError: As for ``task_expert``, or if the task reads texts split into words.
    """
    spec = model.tasks[task]
    if model.checkpoint.model.by_words and spec.reads == "text" and find_kind(spec.kind).level == "text":
        raise ExportError(
            f"Task {task!r} reads texts split into words, because it shares an expert with a tagger. Only the format "
            "multitask supports this. Or export the task from the checkpoint of its teacher."
        )
    return task_expert(model, task)


def task_expert(model: LoadedModel, task: str) -> Expert:
    """Return the one expert that answers a task; of an own and a shared one, their sum.

    Raises:
        ExportError: If several experts answer the task, because a choice that depends on the text is not a weight, or
            if the task's kind compares the parts of a row with each other.
    """
    kind = model.tasks[task].kind
    if find_kind(kind).grouped:
        raise ExportError(
            f"Task {task!r} is of the kind {kind}, whose answers are chosen among several logits of a row. No export "
            "does that. Serve the checkpoint with sparse_ft.load."
        )
    slot = model.checkpoint.model.tasks[task]
    advice = (
        "Serve the checkpoint with sparse_ft.load, or train one expert for the task by itself and export that: "
        f"sparse-ft train --task {task}."
    )
    if slot.gated:
        raise ExportError(
            f"Task {task!r} is answered by experts that the gate weights for each text ({', '.join(slot.experts)}). "
            f"Weights that depend on the text cannot be folded into a linear. {advice}"
        )
    experts = model.checkpoint.model.experts
    own = experts.get(slot.experts[0])
    return own if slot.shared is None else sum_of_experts(own.name, [own, experts.get(slot.shared)])


def sees_shapes(model: LoadedModel, task: str) -> bool:
    """Say whether the answers of a task depend on how words are written, which only tasks that tag words can."""
    return task_expert(model, task).word_shapes is not None and find_kind(model.tasks[task].kind).level == "word"


def any_shapes(model: LoadedModel, tasks: Sequence[str]) -> bool:
    """Say whether the answers of at least one task depend on how words are written."""
    return any(sees_shapes(model, task) for task in tasks)


def shape_table(expert: Expert, backbone: Backbone) -> Tensor:
    """Return the vectors that an expert adds by how a word is written, [shapes, hidden]; row 0, no word, is 0."""
    if expert.word_shapes is None:
        return torch.zeros(len(SHAPES), backbone.hidden_size)
    return torch.cat([torch.zeros_like(expert.word_shapes[:1]), expert.word_shapes[1:]])


def token_classifier(backbone: Backbone, outputs: Sequence[str], head: nn.Linear) -> TokenClassifier:
    """Put a backbone and a head into the token classifier that transformers has for them.

    Args:
        backbone: Backbone without expert layers, which the classifier takes over.
        outputs: Names of the outputs of the head.
        head: Copied.

    Raises:
        ExportError: If that classifier has more layers between backbone and head.
    """
    config = copy.deepcopy(backbone.config)
    config.id2label = dict(enumerate(outputs))
    config.label2id = {name: index for index, name in enumerate(outputs)}
    model, prefix, attribute = empty_classifier(config)
    setattr(model, prefix, backbone.model)
    setattr(model, attribute, copy.deepcopy(head).cpu().float())
    return TokenClassifier(model.eval().requires_grad_(False), prefix, attribute)


def empty_classifier(config: Any) -> TokenClassifier:
    """Build the token classifier of an architecture on the meta device, without memory for its weights.

    Args:
        config: The backbone's config of transformers.

    Raises:
        ExportError: If the classifier has more layers between backbone and head.
    """
    from transformers import AutoModelForTokenClassification

    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(config, trust_remote_code=False)
    inside = [name for name, module in model.named_children() if any(True for _ in module.parameters())]
    heads = [name for name in inside if name in LINEAR_HEADS]
    if len(heads) != 1 or inside != [model.base_model_prefix, *heads]:
        raise ExportError(
            f"transformers' {type(model).__name__} has another layer between the blocks and the head "
            f"({', '.join(inside)}), which an expert of this backbone was trained without. Export it as onnx."
        )
    return TokenClassifier(model, model.base_model_prefix, heads[0])


def save_tokenizer(model: LoadedModel, folder: Path) -> None:
    """Write the tokenizer with settings by which the defaults of other libraries give the tokens of the checkpoint.

    The longest row is the checkpoint's, padding is on the right with a token of its own, and token types are given only
    if the backbone has them.
    """
    tokenizer = fresh_tokenizer(model.checkpoint.model.backbone.tokenizer)
    tokenizer.model_max_length = model.encoder.max_length
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.checkpoint.model.backbone.pad_id)
    if not model.encoder.has_types:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path, *, exported_class: Any = None) -> Any:
    """Load an exported tokenizer as its user would, or by the class that the export brings."""
    from transformers import AutoTokenizer

    loader = exported_class or AutoTokenizer
    tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = (
        True  # such rows are left out
    )
    return tokenizer


def fresh_copy(backbone: Backbone) -> Backbone:
    """Load a backbone once more: as published, on the CPU, in float32, without experts."""
    return load_backbone(backbone.name, revision=backbone.revision, expected_sha256=backbone.weights_sha256)


@torch.no_grad()
def fold(backbone: Backbone, expert: Expert) -> None:
    """Add the deltas of an expert to the weights of a backbone without expert layers, computed in float64.

    Word shapes are no weight of a linear, so they are not folded.
    """
    for module, (lora_a, lora_b) in expert.deltas.items():
        linear = backbone.linears[module]
        weight = linear.weight
        assert isinstance(weight, torch.Tensor)
        delta = lora_b.double() @ lora_a.double() * (expert.alpha / len(lora_a))  # [O, I]
        delta = delta if isinstance(linear, torch.nn.Linear) else delta.t()  # Conv1D keeps [I, O]
        weight.copy_(weight.double() + delta)
