"""What every format takes out of a checkpoint: one expert, a tokenizer, labels, and transformers' classifier on it."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_ft.backbone.backbone import Backbone, fresh_tokenizer, load_backbone
from sparse_ft.backbone.words import SHAPES
from sparse_ft.errors import ExportError
from sparse_ft.experts.named_experts import Expert
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.spec import TaskSpec

_HEADS = ("classifier", "score")
"""How transformers' token classifiers name their head."""


class TokenClassifier(NamedTuple):
    """The token classifier that transformers has for a backbone."""

    model: nn.Module
    prefix: str
    """Name of the backbone in it, e.g. ``bert``."""
    head: str
    """Name of the linear on its hidden states, e.g. ``classifier``."""


def sole_expert(model: LoadedModel, task: str) -> Expert:
    """Return the one expert that answers a task.

    Raises:
        ExportError: If there are several, for what depends on the text is no weight; or if the task's kind compares
            the parts of a row with each other.
    """
    kind = model.tasks[task].kind
    if find_kind(kind).grouped:
        raise ExportError(
            f"Task {task!r} is of the kind {kind}, whose answers are chosen among several logits of a row, which no "
            "export does. Serve the checkpoint with sparse_ft.load."
        )
    slot = model.checkpoint.model.tasks[task]
    advice = (
        "Serve the checkpoint with sparse_ft.load, or train one expert for the task by itself and export that: "
        f"sparse-ft train --task {task}."
    )
    if slot.gated:
        raise ExportError(
            f"Task {task!r} is answered by experts that the gate chooses and weighs for each text "
            f"({', '.join(slot.experts)}), and what depends on the text cannot be folded into weights. {advice}"
        )
    if slot.shared is not None:
        raise ExportError(
            f"Task {task!r} is answered by two experts together, {slot.experts[0]!r} and the shared {slot.shared!r}; "
            f"an export holds one. {advice}"
        )
    return model.checkpoint.model.experts.get(slot.experts[0])


def sees_shapes(model: LoadedModel, task: str) -> bool:
    """Say whether the answers of a task depend on how words are written; texts have no words, so theirs do not."""
    return sole_expert(model, task).word_shapes is not None and find_kind(model.tasks[task].kind).level == "word"


def any_shapes(model: LoadedModel, tasks: Sequence[str]) -> bool:
    """Say whether that holds for one of several tasks at least."""
    return any(sees_shapes(model, task) for task in tasks)


def shape_table(expert: Expert, backbone: Backbone) -> Tensor:
    """Return what an expert adds to words by how they are written, [shapes, hidden]; what is no word adds nothing."""
    if expert.word_shapes is None:
        return torch.zeros(len(SHAPES), backbone.hidden_size)
    return torch.cat([torch.zeros_like(expert.word_shapes[:1]), expert.word_shapes[1:]])


def token_classifier(backbone: Backbone, spec: TaskSpec, head: nn.Linear) -> TokenClassifier:
    """Put a backbone and a head into the token classifier that transformers has for them.

    Args:
        backbone: Without expert layers; belongs to the classifier after this.
        spec: Names the labels.
        head: Weights of the task's head; copied.

    Raises:
        ExportError: If that classifier has more layers between backbone and head.
    """
    config = copy.deepcopy(backbone.config)
    names = find_kind(spec.kind).outputs(spec.label_names or [])
    config.id2label = dict(enumerate(names))
    config.label2id = {name: place for place, name in enumerate(names)}
    model, prefix, place = empty_classifier(config)
    setattr(model, prefix, backbone.model)
    setattr(model, place, copy.deepcopy(head).cpu().float())
    return TokenClassifier(model.eval().requires_grad_(False), prefix, place)


def empty_classifier(config: Any) -> TokenClassifier:
    """Build the token classifier of an architecture without any memory for its weights.

    Args:
        config: Of transformers.

    Raises:
        ExportError: If it has more layers between backbone and head.
    """
    from transformers import AutoModelForTokenClassification

    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(config)
    inside = [name for name, module in model.named_children() if any(True for _ in module.parameters())]
    found = [name for name in inside if name in _HEADS]
    if len(found) != 1 or inside != [model.base_model_prefix, *found]:
        raise ExportError(
            f"transformers' {type(model).__name__} has another layer between the blocks and the head "
            f"({', '.join(inside)}), which an expert of this backbone was trained without. Export it as onnx."
        )
    return TokenClassifier(model, model.base_model_prefix, found[0])


def save_tokenizer(model: LoadedModel, folder: Path) -> None:
    """Write the tokenizer, so set that the defaults of other libraries give the tokens of the checkpoint.

    Its longest row is the checkpoint's, it pads on the right and has a token for it, and gives token types only if the
    backbone knows them.
    """
    tokenizer = fresh_tokenizer(model.checkpoint.model.backbone.tokenizer)
    tokenizer.model_max_length = model.encoder.max_length
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.checkpoint.model.backbone.pad_id)
    if not model.encoder.has_types:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path, *, own: Any = None) -> Any:
    """Load an exported tokenizer as its user would, or by the class ``own`` that the export brings."""
    from transformers import AutoTokenizer

    tokenizer = (own or AutoTokenizer).from_pretrained(folder, local_files_only=True)
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # we leave those out
    return tokenizer


def fresh_copy(backbone: Backbone) -> Backbone:
    """Load a backbone once more: as published, on the CPU, in float32, without experts."""
    return load_backbone(backbone.name, revision=backbone.revision, expected_sha256=backbone.weights_sha256)


@torch.no_grad()
def fold(backbone: Backbone, expert: Expert) -> None:
    """Add the deltas of an expert to the weights of a backbone that has no expert layers, computed in float64.

    What the expert knows of word shapes is no weight of a linear, so it cannot be folded.
    """
    for module, (lora_a, lora_b) in expert.deltas.items():
        linear = backbone.linears[module]
        weight = linear.weight
        assert isinstance(weight, torch.Tensor)
        delta = lora_b.double() @ lora_a.double() * (expert.alpha / len(lora_a))  # [O, I]
        delta = delta if isinstance(linear, torch.nn.Linear) else delta.t()  # Conv1D keeps [I, O]
        weight.copy_(weight.double() + delta)
