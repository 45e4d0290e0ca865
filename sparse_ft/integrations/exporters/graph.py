"""The module that is traced into ONNX: backbone, experts and heads in plain operations, without slot or gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.backbone.pooling import pool
from sparse_ft.experts.named_experts import Expert
from sparse_ft.integrations.exporters.parts import any_shapes, fold, fresh_copy, shape_table
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.kinds import find_kind


class _Pass:
    """Inputs of a forward pass that the layers read besides hidden states; no module, so tracing ignores it."""

    def __init__(self) -> None:
        self.expert: Tensor | None = None
        self.word_shapes: Tensor | None = None


class _Layer(nn.Module):
    """A linear and the deltas of all experts, in plain operations: a row fetches the matrices of its expert.

    Deltas of a lower rank are padded with zeros; an expert without a delta here has zeros alone.
    """

    def __init__(
        self, frozen: nn.Module, deltas: Sequence[tuple[Tensor, Tensor, float] | None], running: _Pass
    ) -> None:
        super().__init__()
        self.frozen, self.running = frozen, running
        present = [delta for delta in deltas if delta is not None]
        rank, width = max(len(delta[0]) for delta in present), present[0][0].shape[1]
        bank_a = torch.zeros(len(deltas), width, rank)
        bank_b = torch.zeros(len(deltas), rank, present[0][1].shape[0])
        for index, delta in enumerate(deltas):
            if delta is not None:
                lora_a, lora_b, alpha = delta
                bank_a[index, :, : len(lora_a)] = lora_a.t()
                bank_b[index, : len(lora_a)] = lora_b.t() * (alpha / len(lora_a))
        self.bank_a, self.bank_b = nn.Parameter(bank_a, requires_grad=False), nn.Parameter(bank_b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [N, S, I] -> [N, S, O]; GPT-2 gives some of its linears [N * S, I]
        expert = self.running.expert
        assert expert is not None
        rows = x.reshape(expert.shape[0], -1, x.shape[-1])
        delta = rows @ self.bank_a[expert] @ self.bank_b[expert]
        return self.frozen(x) + delta.reshape(*x.shape[:-1], delta.shape[-1])


class Graph(nn.Module):
    """Backbone, experts and heads of some tasks in operations that ONNX has.

    Args:
        model: The checkpoint.
        tasks: Tasks whose heads are in the graph.
        experts: Experts of these tasks; a single one is folded into the weights.
    """

    def __init__(self, model: LoadedModel, tasks: Sequence[str], experts: Sequence[Expert]) -> None:
        super().__init__()
        inner = model.checkpoint.model
        backbone = fresh_copy(inner.backbone)
        self.experts, self.running, self.pooling = list(experts), _Pass(), inner.pooling
        self.model, self.causal = backbone.model, backbone.family.causal
        self.has_types = model.encoder.has_types
        if len(experts) == 1:
            fold(backbone, experts[0])
        else:
            self._add_layers(backbone)
        self.tables = None
        if any_shapes(model, tasks):
            self.tables = nn.Parameter(torch.stack([shape_table(expert, backbone) for expert in experts]))
            self._add_word_shapes(backbone)
        self.heads = nn.ModuleList()
        self.outputs = list(tasks)
        self.words = [find_kind(model.tasks[task].kind).level == "word" for task in tasks]
        for task in tasks:
            linear = nn.Linear(*inner.head(task).linear.weight.shape[::-1])
            linear.load_state_dict(inner.head(task).linear.state_dict())
            self.heads.append(linear)

    def _add_layers(self, backbone: Backbone) -> None:
        for name in dict.fromkeys(name for expert in self.experts for name in expert.deltas):
            deltas = [
                (*expert.deltas[name], expert.alpha) if name in expert.deltas else None for expert in self.experts
            ]
            parent, _, attribute = name.rpartition(".")
            setattr(
                backbone.model.get_submodule(parent), attribute, _Layer(backbone.linears[name], deltas, self.running)
            )

    def _add_word_shapes(self, backbone: Backbone) -> None:
        """Add the vectors of each expert before its block."""
        blocks: dict[int, list[int]] = {}
        for index, expert in enumerate(self.experts):
            if expert.shapes_block is not None:
                blocks.setdefault(expert.shapes_block, []).append(index)
        for block, indices in blocks.items():
            backbone.blocks[block].register_forward_pre_hook(self._adder(indices), with_kwargs=True)

    def _adder(self, indices: Sequence[int]) -> Callable[..., Any]:
        """Return a hook that adds the vectors of some experts to the hidden states before a block."""
        here = torch.zeros(len(self.experts), 1, 1)
        here[list(indices)] = 1.0

        def add(
            _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            expert, shapes = self.running.expert, self.running.word_shapes
            assert self.tables is not None
            assert shapes is not None
            tables = self.tables * here  # [E, shapes, hidden]
            vectors = tables[0][shapes] if expert is None else tables[expert.unsqueeze(1), shapes]
            if arguments:
                return (arguments[0] + vectors, *arguments[1:]), named
            return arguments, {**named, "hidden_states": named["hidden_states"] + vectors}

        return add

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        word_shapes: Tensor | None = None,
        expert: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the logits of each task, [N, labels] or [N, S, tags]."""
        self.running.expert, self.running.word_shapes = expert, word_shapes
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.causal:
            inputs["use_cache"] = False
        hidden = self.model(**inputs).last_hidden_state
        text = pool(hidden, attention_mask, self.pooling)
        return tuple(head(hidden if words else text) for head, words in zip(self.heads, self.words, strict=True))

    def example(self) -> dict[str, Tensor | None]:
        """Return inputs to trace with: three rows of eleven tokens."""
        ids = torch.arange(33).reshape(3, 11) % 7 + 5
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": torch.zeros_like(ids) if self.has_types else None,
            "word_shapes": torch.ones_like(ids) if self.tables is not None else None,
            "expert": torch.arange(3) % len(self.experts) if len(self.experts) > 1 else None,
        }
