"""The model: a frozen backbone, experts on its linears, and one head per task."""

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
from sparse_ft.gates import Gate, GateInput, SequenceGate
from sparse_ft.heads import Head, pool
from sparse_ft.routing import Pass, Routing, RoutingSlot


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
        self.slot.listen(backbone.blocks)
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
        self.gate: SequenceGate | None = None

    @property
    def first_block(self) -> int:
        """The lowest block with an expert layer; what lies below is the same for all tasks."""
        return min((self.backbone.block_of(name) for name in self.experts.layers), default=self.backbone.num_blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.encoder.parameters()).device

    def add_task(self, name: str, *, expert: str, level: str, num_outputs: int) -> Head:
        """Add a head for a task that one of the experts serves, and return it."""
        self.experts.index(expert)
        head = Head(self.backbone.hidden_size, num_outputs, slot=self.slot).to(self.device)
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

    def remove_task(self, name: str) -> None:
        """Remove a task with its head."""
        self.head(name)  # refuses an unknown one
        del self.heads[_head_key(name)], self.tasks[name]

    def text_gate(self) -> SequenceGate:
        """Return the gate that decides which expert a text goes to.

        Raises:
            ConfigError: If there is none, or the experts are no longer those that it was fitted on.
        """
        advice = "Fit one with `sparse-ft train --stage gate --from CHECKPOINT`, or name the tasks with --task."
        gate, names = self.gate, self.experts.names
        if gate is None:
            raise ConfigError(f"This model has no gate to choose among its experts. {advice}")
        unknown = [name for name in names if name not in gate.names]
        if unknown:
            raise ConfigError(f"The gate does not know the expert {unknown[0]!r}, which came later. {advice}")
        if gate.names != names:
            raise ConfigError(
                f"The gate chooses among {', '.join(gate.names)}, the model has {', '.join(names)}. {advice}"
            )
        return gate

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

    def forward(
        self,
        batch: Batch,
        *,
        routing: Routing | None = None,
        gate: Gate | None = None,
        seen: dict[int, Routing] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Answer every task of a batch.

        Args:
            batch: Rows of one or several tasks.
            routing: Of the rows; None routes each row to the expert of its task.
            gate: Asked at every block with experts in place of ``routing``.
            seen: Filled with the routing of each block that the gate was asked at.
            generator: Of the dropout on experts and heads; None takes the global one.

        Returns:
            Logits per task in float32, (rows, labels), or (words, tags) for tasks that read words.
        """
        if routing is None:
            experts = [self.experts.index(self.tasks[rows.task].expert) for rows in batch.tasks]
            spread = [
                expert for expert, rows in zip(experts, batch.tasks, strict=True) for _ in range(rows.start, rows.stop)
            ]
            routing = Routing.rows(spread, device=self.device)
        whole = self.backbone.family.routes_rows or (gate is None and routing.only is not None)
        # Some layers of other families see more than one entry a row: one expert a pass, or one row.
        stretches = [slice(None)] if whole else routing.stretches(single_rows=gate is not None)
        parts = [
            self._hidden(
                batch, rows, Pass(routing if whole else routing.take(rows), generator=generator), gate=gate, seen=seen
            )
            for rows in stretches
        ]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        with self.slot.filled(Pass(routing, generator=generator)):  # for the dropout of the heads
            return {rows.task: self._head_logits(rows, hidden, batch) for rows in batch.tasks}

    def _hidden(
        self, batch: Batch, rows: slice, running: Pass, *, gate: Gate | None, seen: dict[int, Routing] | None
    ) -> Tensor:
        """Run some rows through the backbone: [N, S, hidden]."""
        mask = batch.attention_mask[rows]
        inputs: dict[str, Any] = {"input_ids": batch.input_ids[rows], "attention_mask": mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[rows]
        if self.backbone.family.causal:
            inputs["use_cache"] = False
        if gate is not None:
            for block in range(self.first_block, self.backbone.num_blocks):
                ask = functools.partial(self._ask, gate, attention_mask=mask, block=block, seen=seen)
                running.changes.setdefault(block, []).append(ask)
        if batch.word_shapes is not None:
            assert running.routing is not None
            present = running.routing.present if gate is None else None
            for block, chosen in self.word_shapes.blocks_of(present).items():
                add = functools.partial(self._add_word_shapes, shapes=batch.word_shapes[rows], chosen=chosen)
                running.changes.setdefault(block, []).append(add)
        if batch.trunk is not None:
            running.trunk, running.first_block = batch.trunk[rows], self.first_block
        with self.slot.filled(running):
            return self.encoder(**inputs).last_hidden_state

    def _ask(
        self, gate: Gate, hidden: Tensor, *, attention_mask: Tensor, block: int, seen: dict[int, Routing] | None
    ) -> Tensor:
        """Let a gate decide for one block; the hidden states stay as they are."""
        routing = gate.route(GateInput(hidden, attention_mask, block))
        self.slot.replace(routing)
        if seen is not None:
            seen[block] = routing
        return hidden

    def _add_word_shapes(self, hidden: Tensor, *, shapes: Tensor, chosen: Sequence[int]) -> Tensor:
        routing = self.slot.read()
        assert routing is not None
        return self.word_shapes.added(hidden, shapes, routing=routing, chosen=chosen)

    def _head_logits(self, rows: TaskRows, hidden: Tensor, batch: Batch) -> Tensor:
        """Apply a task's head to its rows."""
        head = self.head(rows.task)
        if self.tasks[rows.task].level == "word":
            if rows.words is None:  # a batch of texts without a single word
                return head(hidden.new_zeros(0, hidden.shape[-1]))
            in_rows, in_tokens = rows.words
            return head(hidden[in_rows, in_tokens])
        own = slice(rows.start, rows.stop)
        return head(pool(hidden[own], batch.attention_mask[own], self.pooling))


def _head_key(task: str) -> str:
    """Name a head's module so that no task name meets an attribute of ``nn.ModuleDict``."""
    return f"task_{task}"
