"""Export to transformers: a dense model with the expert folded into the weights.

A tagging task becomes transformers' own token classifier. A task on texts becomes the same model with a small modelling
file beside it, which pools the logits of the tokens (see peft_folder.py: that is exact), because no text classifier of
transformers has a linear head over the mean of the tokens.
"""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_ft.exporters.parts import POOLING_WORDS, load_tokenizer, plain_expert, save_tokenizer, token_classifier
from sparse_ft.folders import write_bytes, write_json
from sparse_ft.folding import fold, fresh_copy
from sparse_ft.kinds import find_kind
from sparse_ft.prediction import LoadedModel
from sparse_ft.round_trip import Difference, compare, sample_texts

MODELLING = "modeling_pooled.py"
_PROBLEMS = {"classification": "single_label_classification", "multi_label": "multi_label_classification"}
_POOLED = {
    "mean": "(tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)",
    "first": "tokens[:, 0]",
    "last": "tokens[torch.arange(len(mask), device=mask.device), (mask.cumsum(1) * mask).argmax(1)]",
}

_SOURCE = '''"""{stock} with one answer a text: {words}.

Written by sparse-ft. The head is linear, so it may stand before the pooling as well as behind it.
"""

import torch
from transformers import {config}, {stock}
from transformers.modeling_outputs import SequenceClassifierOutput


class PooledConfig({config}):
    # A type of its own, so that no stock class takes these weights for its own.
    model_type = "pooled_{model_type}"


class PooledForSequenceClassification({stock}):
    config_class = PooledConfig

    def __init__(self, config):
        super().__init__({config}.from_dict(config.to_dict()))  # the type by which the library builds the backbone
        self.config = config

    def forward(self, input_ids, attention_mask=None, **inputs):
        tokens = super().forward(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits
        mask = torch.ones_like(tokens[..., 0]) if attention_mask is None else attention_mask.to(tokens.dtype)
        return SequenceClassifierOutput(logits={pooled})
'''


def write_transformers(model: LoadedModel, tasks: Sequence[str], folder: Path) -> dict[str, Difference]:
    """Write the dense model of a task into a folder, and run it through transformers.

    Args:
        model: The checkpoint.
        tasks: One task.
        folder: To write into.

    Raises:
        ExportError: If the task cannot be expressed so.
    """
    (task,) = tasks
    inner, spec = model.checkpoint.model, model.tasks[task]
    expert, backbone = plain_expert(model, task), fresh_copy(inner.backbone)
    fold(backbone, expert)
    dense: Any = token_classifier(backbone, spec, inner.head(task).linear).model
    dense.config.problem_type = _PROBLEMS.get(spec.kind)
    dense.save_pretrained(folder)
    save_tokenizer(model, folder)
    tokenizer = load_tokenizer(folder)  # before the config names code, which transformers asks the user about
    words = find_kind(spec.kind).level == "word"
    if not words:
        _write_pooled(folder, stock=dense, pooling=inner.pooling)
    loaded = (type(dense) if words else _own_class(folder)).from_pretrained(folder, local_files_only=True).eval()

    def run(batch: dict[str, Tensor]) -> Tensor:
        return loaded(**{name: value for name, value in batch.items() if name != "word_shapes"}).logits

    return {task: compare(model, task, sample_texts(model, task), run=run, tokenizer=tokenizer)}


def _write_pooled(folder: Path, *, stock: Any, pooling: str) -> None:
    """Let the folder's config name the modelling file, and write that file."""
    source = _SOURCE.format(
        stock=type(stock).__name__,
        config=type(stock.config).__name__,
        model_type=stock.config.model_type,
        words=POOLING_WORDS[pooling],
        pooled=_POOLED[pooling],
    )
    write_bytes(folder / MODELLING, source.encode())
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_type"] = f"pooled_{config['model_type']}"
    config["architectures"] = ["PooledForSequenceClassification"]
    module = MODELLING.removesuffix(".py")
    config["auto_map"] = {
        "AutoConfig": f"{module}.PooledConfig",
        "AutoModelForSequenceClassification": f"{module}.PooledForSequenceClassification",
    }
    write_json(file, config)


def _own_class(folder: Path) -> Any:
    """Import the class of the modelling file from where it stands; transformers would keep a copy in its cache."""
    name = f"sparse_ft_export_{abs(hash(folder))}"
    description = importlib.util.spec_from_file_location(name, folder / MODELLING)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module
    try:
        description.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module.PooledForSequenceClassification
