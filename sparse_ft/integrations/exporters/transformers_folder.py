"""Export to transformers: a dense model with the expert folded into the weights.

A tagging task becomes transformers' stock token classifier, unless its expert sees word shapes. A task on texts becomes
the same model, which pools before its head, because no text classifier of transformers has a linear head over the mean
of the tokens. Pooled models and those that see word shapes bring their code; see modelling.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_ft.integrations.exporters.modelling import exported_class, write_pooled, write_shaped
from sparse_ft.integrations.exporters.parts import (
    fold,
    fresh_copy,
    load_tokenizer,
    save_tokenizer,
    sees_shapes,
    shape_table,
    sole_expert,
    token_classifier,
)
from sparse_ft.integrations.round_trip import Difference, compare
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.kinds import find_kind

_PROBLEMS = {"classification": "single_label_classification", "multi_label": "multi_label_classification"}


def write_transformers(model: LoadedModel, tasks: Sequence[str], folder: Path) -> dict[str, Difference]:
    """Write the dense model of one task into a folder, and run it through transformers; see ``Exporter.write``."""
    (task,) = tasks
    inner, spec = model.checkpoint.model, model.tasks[task]
    expert, backbone = sole_expert(model, task), fresh_copy(inner.backbone)
    fold(backbone, expert)
    stock = token_classifier(backbone, find_kind(spec.kind).outputs(spec.label_names or []), inner.head(task).linear)
    dense: Any = stock.model
    dense.config.problem_type = _PROBLEMS.get(spec.kind)
    shaped = sees_shapes(model, task)
    weights = dense.state_dict() | ({"word_shapes.weight": shape_table(expert, backbone)} if shaped else {})
    dense.save_pretrained(folder, state_dict=weights)
    save_tokenizer(model, folder)
    if shaped:
        block = f"{stock.prefix}.{backbone.family.blocks}.{expert.shapes_block}"
        write_shaped(folder, stock=dense, block=block, width=backbone.hidden_size, language=spec.language)
        loader = exported_class(folder, "modeling_shaped", "ShapedForTokenClassification")
        tokenizer = load_tokenizer(
            folder, exported_class=exported_class(folder, "tokenization_shaped", "ShapedTokenizer")
        )
    else:
        tokenizer, loader = load_tokenizer(folder), type(dense)
        if find_kind(spec.kind).level == "text":
            write_pooled(folder, stock=stock, pooling=inner.pooling)
            loader = exported_class(folder, "modeling_pooled", "PooledForSequenceClassification")
    loaded = loader.from_pretrained(folder, local_files_only=True).eval()

    def run(batch: dict[str, Tensor]) -> Tensor:
        return loaded(**{name: value for name, value in batch.items() if name != "word_shapes" or shaped}).logits

    return {task: compare(model, task, run=run, tokenizer=tokenizer)}
