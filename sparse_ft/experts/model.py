"""The model: a frozen backbone, experts on its linears, and one head per task."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.backbone.batching import Batch, TaskRows
from sparse_ft.backbone.pooling import pool
from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.experts.gates import Gate, GateInput, SequenceGate, TokenGate
from sparse_ft.experts.heads import Head
from sparse_ft.experts.named_experts import Experts
from sparse_ft.experts.routing import ForwardPass, Routing, RoutingSlot


@dataclass(frozen=True)
class TaskSlot:
    """What the model knows of a task: which experts serve it, and how its head reads."""

    experts: tuple[str, ...]
    """Those that learn from its rows: one as a rule; several are domains of the task, or a pool, and the gate picks."""
    level: str
    """``text`` or ``word``."""
    joint: bool = False
    """Whether the task was trained jointly with the gate, which then mixes for it all the experts that it knows."""
    shared: str | None = None
    """The expert that each of its rows uses besides those that the gate chooses."""

    @property
    def used(self) -> list[str]:
        """All experts that learn from its rows."""
        return [*self.experts, *([] if self.shared is None else [self.shared])]

    @property
    def gated(self) -> bool:
        """Whether the gate is asked even though the task is known."""
        return self.joint or len(self.experts) > 1


def _knows(gate: Gate, block: int) -> bool:
    return not isinstance(gate, TokenGate) or block in gate.blocks


class SparseExpertModel(nn.Module):
    """One frozen backbone that answers every task through the task's expert and head.

    Args:
        backbone: Loaded by ``load_backbone``; its linears are replaced in place, so it belongs to this model then.
        pooling: ``unit``, ``mean``, ``first`` or ``last``, see ``heads.pool``; ``auto`` is ``last`` for causal
            backbones, else ``unit``.
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
        self.pooling = pooling if pooling != "auto" else ("last" if backbone.family.causal else "unit")
        self.heads = nn.ModuleDict()
        self.tasks: dict[str, TaskSlot] = {}
        self.backbone_dropout = False
        self.gate: SequenceGate | TokenGate | None = None

    @property
    def first_block(self) -> int:
        """The lowest block with an expert layer; what lies below is the same for all tasks."""
        return min((self.backbone.block_of(name) for name in self.experts.layers), default=self.backbone.num_blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.encoder.parameters()).device

    @property
    def routed(self) -> list[str]:
        """The experts that a gate may choose: all but those that rows use anyway."""
        shared = {slot.shared for slot in self.tasks.values()}
        return [name for name in self.experts.names if name not in shared]

    def add_task(
        self,
        name: str,
        *,
        expert: str | Sequence[str],
        level: str,
        num_outputs: int,
        joint: bool = False,
        shared: str | None = None,
    ) -> Head:
        """Add a head for a task that one of the experts serves, or several, and return it; see ``TaskSlot``."""
        slot = TaskSlot((expert,) if isinstance(expert, str) else tuple(expert), level, joint, shared)
        for used in slot.used:
            self.experts.index(used)
        head = Head(self.backbone.hidden_size, num_outputs, slot=self.slot).to(self.device)
        self.heads[_head_key(name)] = head
        self.tasks[name] = slot
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
        gate, names = self.gate, self.routed
        if gate is None:
            raise ConfigError(f"This model has no gate to choose among its experts. {advice}")
        if isinstance(gate, TokenGate):
            raise ConfigError(
                "The gate of this model decides for every token, not for whole texts. Name the tasks with --task."
            )
        unknown = [name for name in names if name not in gate.names]
        if unknown and any(slot.joint for slot in self.tasks.values()):
            raise ConfigError(
                f"The gate was trained with the experts that it mixes and does not know {unknown[0]!r}. Name the tasks "
                "with --task."
            )
        if unknown:
            raise ConfigError(f"The gate does not know the expert {unknown[0]!r}, which came later. {advice}")
        if set(gate.names) != set(names):
            raise ConfigError(
                f"The gate chooses among {', '.join(gate.names)}, the model has {', '.join(names)}. {advice}"
            )
        return gate

    def reindexed(self, routing: Routing, *, names: Sequence[str] | None = None) -> Routing:
        """Turn what a gate says of its experts, by default this model's, into a routing among those of the model.

        A gate may know experts that were removed since, which it gives no weight.
        """
        if names is None:
            assert self.gate is not None
            names = self.gate.names
        places = [self.experts.index(name) if name in self.experts.names else 0 for name in names]
        return routing.reindexed(places, num_experts=len(self.experts.names))

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
            routing: Of the rows; None routes each row to the expert of its task, or asks the model's own gate at every
                block if the tasks were trained so.
            gate: Asked at every block with experts in place of ``routing``.
            seen: Filled with the routing of each block that the gate was asked at.
            generator: Of the dropout on experts and heads; None takes the global one.

        Returns:
            Logits per task in float32, (rows, labels), or (words, tags) for tasks that read words.
        """
        hidden = batch.hidden
        if hidden is None:
            hidden = self.hidden_states(batch, routing=routing, gate=gate, seen=seen, generator=generator)
        with self.slot.filled(ForwardPass(None, generator=generator)):  # for the dropout of the heads
            return {rows.task: self._head_logits(rows, hidden, batch) for rows in batch.tasks}

    def hidden_states(
        self,
        batch: Batch,
        *,
        routing: Routing | None = None,
        gate: Gate | None = None,
        seen: dict[int, Routing] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Run a batch through backbone and experts, [N, S, H]; the arguments are those of ``forward``."""
        if routing is None and gate is None:
            routing, gate = self._default_routing(batch)
        shared = self._shared_rows(batch)
        if gate is not None:  # which will say; until then no expert is chosen
            routing = Routing(None, torch.zeros(len(batch.input_ids), len(self.experts.names), device=self.device))
        assert routing is not None
        if gate is None and shared is not None:
            routing = routing.with_expert(*shared)
        # Some layers of other families see more than one entry a row: one expert a pass, or one row.
        whole = self.backbone.family.routes_rows or (gate is None and routing.only is not None)
        parts = []
        for rows in [slice(None)] if whole else routing.segments(single_rows=gate is not None):
            running = ForwardPass(routing if whole else routing.take(rows), generator=generator)
            asked = None
            if gate is not None:
                added = None if shared is None else (shared[0], shared[1][rows])
                mask = batch.attention_mask[rows]
                asked = functools.partial(self._ask, gate, attention_mask=mask, seen=seen, shared=added)
            parts.append(self._through(batch, rows, running, asked=asked))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bare_states(self, batch: Batch) -> Tensor:
        """Run a batch of texts through the backbone without any expert, [N, S, H]."""
        return self._through(batch, slice(None), ForwardPass(None), asked=None)

    def _default_routing(self, batch: Batch) -> tuple[Routing | None, Gate | None]:
        """Route rows by their tasks: each to its expert, or all by the gate that their tasks were trained with."""
        slots = {rows.task: self.tasks[rows.task] for rows in batch.tasks}
        gated = [task for task, slot in slots.items() if slot.gated]
        if not gated:
            experts = [self.experts.index(slots[rows.task].experts[0]) for rows in batch.tasks]
            spread = [
                expert for expert, rows in zip(experts, batch.tasks, strict=True) for _ in range(rows.start, rows.stop)
            ]
            return Routing.one_hot(spread, device=self.device), None
        if not isinstance(self.gate, TokenGate) or len(gated) < len(slots):
            raise ValueError(f"The rows of task {gated[0]!r} must be routed first; see inference.text_routing.")
        return None, self.gate

    def _shared_rows(self, batch: Batch) -> tuple[int, Tensor] | None:
        """Return the index of the expert that rows use besides those chosen, and which rows do, [N]."""
        names = [self.tasks[rows.task].shared for rows in batch.tasks]
        used = sorted({name for name in names if name is not None})
        if not used:
            return None
        if len(used) > 1:
            raise ValueError(f"The tasks of one batch use several shared experts: {', '.join(used)}.")
        rows = torch.zeros(len(batch.input_ids), device=self.device)
        for name, place in zip(names, batch.tasks, strict=True):
            rows[place.start : place.stop] = float(name is not None)
        return self.experts.index(used[0]), rows

    def _through(
        self, batch: Batch, rows: slice, running: ForwardPass, *, asked: Callable[..., Tensor] | None
    ) -> Tensor:
        """Run some rows through the backbone, asking a gate at every block with experts if there is one: [N, S, H]."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids[rows], "attention_mask": batch.attention_mask[rows]}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[rows]
        if self.backbone.family.causal:
            inputs["use_cache"] = False
        if asked is not None:
            for block in range(self.first_block, self.backbone.num_blocks):
                running.changes.setdefault(block, []).append(functools.partial(asked, block=block))
        if batch.word_shapes is not None:
            assert running.routing is not None
            present = running.routing.present if asked is None else None
            for block, chosen in self.word_shapes.blocks_of(present).items():
                add = functools.partial(self._add_word_shapes, shapes=batch.word_shapes[rows], chosen=chosen)
                running.changes.setdefault(block, []).append(add)
        if batch.trunk is not None:
            running.trunk, running.first_block = batch.trunk[rows], self.first_block
        with self.slot.filled(running):
            return self.encoder(**inputs).last_hidden_state

    def blocks_asked(self, gate: Gate) -> list[int]:
        """Return the 0-based blocks at which a gate decides: a token gate knows none of an expert that came later."""
        return [block for block in range(self.first_block, self.backbone.num_blocks) if _knows(gate, block)]

    def _ask(
        self,
        gate: Gate,
        hidden: Tensor,
        *,
        attention_mask: Tensor,
        block: int,
        seen: dict[int, Routing] | None,
        shared: tuple[int, Tensor] | None,
    ) -> Tensor:
        """Let a gate decide for one block; the hidden states stay as they are."""
        if not _knows(gate, block):
            return hidden
        running = self.slot.running
        assert running is not None
        routing = gate.route(GateInput(hidden, attention_mask, block, generator=running.generator))
        routing = self.reindexed(routing, names=gate.names)
        if seen is not None:
            seen[block] = routing
        self.slot.replace(routing if shared is None else routing.with_expert(*shared))
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


def check_token_routing(model: SparseExpertModel) -> None:
    """Refuse an architecture that cannot route tokens.

    Raises:
        ConfigError: If it cannot.
    """
    if not model.backbone.family.routes_rows:
        raise ConfigError(
            f"The tokens of backbone {model.backbone.name!r} cannot be routed one by one: its attention shares layers "
            "between rows. Route whole texts."
        )
