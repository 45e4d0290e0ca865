"""Export to transformers: one dense model with a head for each task, where one expert serves all tasks.

The expert is folded into the weights, so one plain pass answers everything. `distill --passes 1` makes such an expert.
The model and its tokenizer bring their code; see modelling.py.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_ft.errors import ExportError
from sparse_ft.experts.named_experts import Expert
from sparse_ft.integrations.exporters.modelling import exported_class, write_multitask
from sparse_ft.integrations.exporters.parts import (
    fold,
    fresh_copy,
    load_tokenizer,
    save_tokenizer,
    shape_table,
    task_expert,
    token_classifier,
)
from sparse_ft.integrations.round_trip import Difference, compare
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.kinds import find_kind


def write_multitask_folder(model: LoadedModel, tasks: Sequence[str], folder: Path) -> dict[str, Difference]:
    """Write the dense model of tasks into a folder, and run it through transformers; see ``Exporter.write``."""
    inner, languages = model.checkpoint.model, {model.tasks[task].language for task in tasks}
    expert, backbone = _common_expert(model, tasks), fresh_copy(inner.backbone)
    if len(languages) > 1:
        raise ExportError(
            f"The tasks are in several languages ({', '.join(sorted(languages))}), and texts are split into words by "
            "their language. Export a task alone: --task NAME."
        )
    for task in tasks:
        if model.tasks[task].reads != "text":
            raise ExportError(
                f"Task {task!r} reads two texts a row, and the format multitask reads one. Export it alone."
            )
    fold(backbone, expert)
    outputs: list[str] = []
    slices: dict[str, tuple[str, int, int]] = {}
    for task in tasks:
        kind, start = find_kind(model.tasks[task].kind), len(outputs)
        outputs += [f"{task}: {label}" for label in kind.outputs(model.tasks[task].label_names or [])]
        slices[task] = (kind.level, start, len(outputs))
    stock = token_classifier(backbone, outputs, _joined_heads([inner.head(task).linear for task in tasks]))
    weights = stock.model.state_dict() | {"word_shapes.weight": shape_table(expert, backbone)}
    stock.model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
    save_tokenizer(model, folder)
    write_multitask(
        folder,
        stock=stock,
        tasks=slices,
        pooling=inner.pooling,
        block=f"{stock.prefix}.{backbone.family.blocks}.{expert.shapes_block or 0}",
        width=backbone.hidden_size,
        language=languages.pop(),
        by_words=inner.by_words,
    )
    loader = exported_class(folder, "modeling_multitask", "MultitaskForTasks")
    loaded = loader.from_pretrained(folder, local_files_only=True)
    tokenizer = load_tokenizer(folder, exported_class=exported_class(folder, "tokenization_shaped", "ShapedTokenizer"))

    def run(task: str, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = loaded.eval()(**batch)[task]
        return logits

    return {
        task: compare(model, task, run=lambda batch, task=task: run(task, batch), tokenizer=tokenizer)  # type: ignore[misc]
        for task in tasks
    }


def _joined_heads(heads: Sequence[nn.Linear]) -> nn.Linear:
    """Return one linear whose rows are those of several heads, one below the other."""
    joined = nn.Linear(heads[0].in_features, sum(head.out_features for head in heads))
    with torch.no_grad():
        joined.weight.copy_(torch.cat([head.weight for head in heads]))
        joined.bias.copy_(torch.cat([head.bias for head in heads]))
    return joined


def _common_expert(model: LoadedModel, tasks: Sequence[str]) -> Expert:
    """Return the expert that serves every one of some tasks.

    Raises:
        ExportError: If two tasks have different ones, or read how words are written in different ways.
    """
    first, *others = tasks
    expert = task_expert(model, first)
    for other in others:
        twin = task_expert(model, other)
        same = expert.deltas.keys() == twin.deltas.keys() and all(
            torch.equal(expert.deltas[module][1] @ expert.deltas[module][0] * (expert.alpha / expert.ranks[module]),
                        twin.deltas[module][1] @ twin.deltas[module][0] * (twin.alpha / twin.ranks[module]))
            for module in expert.deltas
        )  # fmt: skip
        if not same:
            raise ExportError(
                f"Tasks {first!r} and {other!r} are answered by different experts, and a dense model has one set of "
                "weights. Make one expert of all: sparse-ft distill CHECKPOINT --passes 1; or export each task alone."
            )
    on_texts = [task for task in tasks if find_kind(model.tasks[task].kind).level == "text"]
    if expert.word_shapes is not None and on_texts and not model.checkpoint.model.by_words:
        raise ExportError(
            f"Tasks on words read how these are written, and task {on_texts[0]!r} on the same expert does not. Train "
            "with --set experts.word_shapes=false, or distil with --passes 1."
        )
    return expert
