"""The model: a frozen backbone, experts on its linears, and one head per task."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.backbone import Backbone
from sparse_ft.batching import Batch, TaskRows
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts import Experts
from sparse_ft.heads import Head, pool
from sparse_ft.routing import Routing, RoutingSlot
from sparse_ft.trunk import skipping_trunk
from sparse_ft.word_shapes import changing_input


@dataclass(frozen=True)
class TaskSlot:
    """What the model knows of a task: which expert serves it, and how its head reads."""

    expert: str
    level: str
    """``text`` or ``word``."""


class SparseExpertModel(nn.Module):
    """One frozen backbone that answers every task through the task's expert and head.

    Args:
        backbone: Loaded by ``load_backbone``; its linears are replaced in place, so it belongs to this model then.
        pooling: ``auto``, ``mean``, ``first`` or ``last``; ``auto`` is ``last`` for causal backbones, else ``mean``.
    """

    def __init__(self, backbone: Backbone, *, pooling: str = "auto") -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = backbone.model
        self.slot = RoutingSlot()
        self.experts = Experts(
            backbone.model,
            backbone.linears,
            block_of=backbone.block_of,
            hidden_size=backbone.hidden_size,
            slot=self.slot,
        )
        self.word_shapes = self.experts.word_shapes  # registers its tables
        self.pooling = pooling if pooling != "auto" else ("last" if backbone.family.causal else "mean")
        self.heads = nn.ModuleDict()
        self.tasks: dict[str, TaskSlot] = {}
        self.backbone_dropout = False

    @property
    def first_block(self) -> int:
        """The lowest block with an expert layer; what lies below is the same for all tasks."""
        return min((self.backbone.block_of(name) for name in self.experts.layers), default=self.backbone.num_blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.encoder.parameters()).device

    def add_task(self, name: str, *, expert: str, level: str, num_outputs: int, dropout: float = 0.0) -> Head:
        """Add a head for a task that one of the experts serves, and return it."""
        self.experts.index(expert)
        head = Head(self.backbone.hidden_size, num_outputs, dropout=dropout).to(self.device)
        self.heads[_head_key(name)] = head
        self.tasks[name] = TaskSlot(expert, level)
        return head

    def head(self, task: str) -> Head:
        """Return the head of a task.

        Raises:
            ConfigError: If the model has no such task.
        """
        if task not in self.tasks:
            raise ConfigError(unknown_name("task in this model", task, self.tasks))
        head = self.heads[_head_key(task)]
        assert isinstance(head, Head)
        return head

    def trainable(self, task: str) -> dict[str, nn.Parameter]:
        """Return what learns from a task: its expert's deltas and its head, by name."""
        found = {f"expert.{name}": value for name, value in self.experts.parameters(self.tasks[task].expert).items()}
        found.update({f"head.{name}": value for name, value in self.head(task).named_parameters()})
        return {name: parameter for name, parameter in found.items() if parameter.numel()}

    def train(self, mode: bool = True) -> "SparseExpertModel":
        """Switch experts and heads to training, and the backbone's own dropout on if ``backbone_dropout`` says so."""
        super().train(mode)
        self.encoder.train(mode and self.backbone_dropout)
        for layer in self.experts.layers.values():
            layer.train(mode)
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Answer every task of a batch.

        Args:
            batch: Rows of one or several tasks; each row is routed to the expert of its task.

        Returns:
            Logits per task in float32, (rows, labels), or (words, tags) for tasks that read words.
        """
        experts = [self.experts.index(self.tasks[rows.task].expert) for rows in batch.tasks]
        if self.backbone.family.routes_rows or len(set(experts)) == 1:
            per_row = [
                expert for expert, rows in zip(experts, batch.tasks, strict=True) for _ in range(rows.start, rows.stop)
            ]
            hidden = self._hidden(batch, 0, len(per_row), per_row)
            return {rows.task: self._head_logits(rows, hidden, batch, 0) for rows in batch.tasks}
        logits = {}
        for expert, rows in zip(experts, batch.tasks, strict=True):
            hidden = self._hidden(batch, rows.start, rows.stop, [expert] * (rows.stop - rows.start))
            logits[rows.task] = self._head_logits(rows, hidden, batch, rows.start)
        return logits

    def _hidden(self, batch: Batch, start: int, stop: int, experts: Sequence[int]) -> Tensor:
        rows = slice(start, stop)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids[rows], "attention_mask": batch.attention_mask[rows]}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[rows]
        if self.backbone.family.causal:
            inputs["use_cache"] = False
        routing = Routing.rows(experts, device=self.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.slot.filled(routing))
            if batch.word_shapes is not None:
                for block, chosen in self.word_shapes.blocks_of(routing.present).items():
                    add = functools.partial(
                        self.word_shapes.added, shapes=batch.word_shapes[rows], routing=routing, chosen=chosen
                    )
                    stack.enter_context(changing_input(self.backbone.blocks[block], add))
            if batch.trunk is not None:
                kept = batch.trunk[rows]
                stack.enter_context(skipping_trunk(self.backbone.blocks, first_block=self.first_block, hidden=kept))
            return self.encoder(**inputs).last_hidden_state  # [N, S, hidden]

    def _head_logits(self, rows: TaskRows, hidden: Tensor, batch: Batch, offset: int) -> Tensor:
        """Apply a task's head; ``hidden`` begins at row ``offset`` of the batch."""
        head = self.head(rows.task)
        if self.tasks[rows.task].level == "word":
            if rows.words is None:  # a batch of texts without a single word
                return head(hidden.new_zeros(0, hidden.shape[-1]))
            in_rows, in_tokens = rows.words
            return head(hidden[in_rows - offset, in_tokens])
        own = slice(rows.start - offset, rows.stop - offset)
        return head(pool(hidden[own], batch.attention_mask[rows.start : rows.stop], self.pooling))


def _head_key(task: str) -> str:
    """Name a head's module so that no task name meets an attribute of ``nn.ModuleDict``."""
    return f"task_{task}"
