"""Export to PEFT: the expert as an adapter of transformers' token classifier, with the head in it.

No text classifier of transformers has a linear head over the mean of the tokens, but the token classifier holds both
parts that this needs: the backbone and the linear. The card shows the lines that pool in between.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_ft.backbone.pooling import pool
from sparse_ft.checkpoint.expert_files import write_adapter
from sparse_ft.errors import ExportError
from sparse_ft.experts.named_experts import Expert
from sparse_ft.integrations.exporters.parts import (
    fresh_copy,
    load_tokenizer,
    save_tokenizer,
    sees_shapes,
    sole_expert,
    token_classifier,
)
from sparse_ft.integrations.round_trip import Difference, compare
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.kinds import find_kind


def plain_expert(model: LoadedModel, task: str) -> Expert:
    """Return the one expert that answers a task, if it consists of deltas alone.

    Raises:
        ExportError: If the expert sees word shapes, or as for ``sole_expert``.
    """
    expert = sole_expert(model, task)
    if sees_shapes(model, task):
        others = [name for name in model.tasks if name != task]
        raise ExportError(
            f"The expert {expert.name!r} of task {task!r} sees how a word is written (experts.word_shapes), for which "
            "an adapter of PEFT cannot hold. Export it as transformers or onnx, serve it with sparse_ft.load, or "
            "train with --set experts.word_shapes=false."
            + (f" --task exports one of the others: {', '.join(others)}." if others else "")
        )
    return expert


def peft_logits(wrapped: Any, batch: dict[str, Tensor], *, head: str, pooling: str | None) -> Tensor:
    """Compute the logits as the card of an export shows.

    Args:
        wrapped: The token classifier with its adapter.
        batch: Output of its tokenizer.
        head: Name of the linear in it.
        pooling: Pooling of the checkpoint; None for a task that tags words.

    Returns:
        [texts, labels], or [texts, tokens, tags].
    """
    if pooling is None:
        return wrapped(**batch).logits
    classifier = wrapped.get_base_model()
    tokens = classifier.base_model(**batch).last_hidden_state
    return getattr(classifier, head)(pool(tokens, batch["attention_mask"], pooling))


def write_peft(model: LoadedModel, tasks: Sequence[str], folder: Path) -> dict[str, Difference]:
    """Write the adapter of one task into a folder, and run it through PEFT; see ``Exporter.write``."""
    from peft import PeftModel

    (task,) = tasks
    inner, spec = model.checkpoint.model, model.tasks[task]
    expert, linear = plain_expert(model, task), inner.head(task).linear
    base = token_classifier(fresh_copy(inner.backbone), find_kind(spec.kind).outputs(spec.label_names or []), linear)
    head = {f"{base.head}.{name}": value.detach().cpu() for name, value in linear.state_dict().items()}
    write_adapter(folder, expert, backbone=inner.backbone, prefix=f"{base.prefix}.", head=head)
    save_tokenizer(model, folder)
    for parameter in getattr(base.model, base.head).parameters():
        parameter.zero_()  # the weights must come from the folder
    wrapped = PeftModel.from_pretrained(base.model, str(folder)).eval()
    pooling = None if find_kind(spec.kind).level == "word" else inner.pooling

    def run(batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "word_shapes"}
        return peft_logits(wrapped, inputs, head=base.head, pooling=pooling)

    return {task: compare(model, task, run=run, tokenizer=load_tokenizer(folder))}
