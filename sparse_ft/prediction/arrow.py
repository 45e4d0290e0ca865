"""Arrow: a gate that reads its decisions off the experts' weights, without training."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_ft.experts.gate_checks import check_token_routing
from sparse_ft.experts.gates import GateInput, without_autocast
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import Routing
from sparse_ft.experts.selection import Selection

# Last parts of the names of linears that read what enters their block (its attention's), in the families we know.
_READ_THE_INPUT = frozenset({
    "query", "key", "value", "q_lin", "k_lin", "v_lin", "query_proj", "key_proj", "value_proj", "Wqkv", "c_attn",
    "query_key_value", "q_proj", "k_proj", "v_proj",
})  # fmt: skip


class ArrowGate(nn.Module):
    """Routes each token by the experts' weights: the larger their first right singular vector responds, the better.

    Ostapenko et al. 2024, "Towards modular LLMs by building and reusing a library of LoRAs",
    https://arxiv.org/abs/2405.11157, section 3.2. One vector a block and expert, of all its deltas that read what
    enters the block, stacked.

    Args:
        names: Experts to choose among.
        vectors: Block to [E, H], each row of length 1, or 0 for an expert without deltas there.
        selection: How the logits become a routing.
    """

    def __init__(self, names: Sequence[str], vectors: Mapping[int, Tensor], *, selection: Selection) -> None:
        super().__init__()
        self.names = list(names)
        self.selection = selection
        self.blocks = list(vectors)
        self.vectors = nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in vectors.values())

    def route(self, inputs: GateInput) -> Routing:
        """Choose experts for each token of one block."""
        vectors = self.vectors[self.blocks.index(inputs.block)]
        with without_autocast(inputs.hidden):
            logits = (inputs.hidden.float() @ vectors.t()).abs()
        return self.selection(logits, mask=inputs.attention_mask)


def arrow_gate(model: SparseExpertModel, *, top_k: int = 2) -> ArrowGate:
    """Build the gate that reads the experts' weights; see ``ArrowGate``.

    Args:
        model: With at least one expert that changes the linears which read a block's input.
        top_k: Experts a token; cut to the number there are.

    Raises:
        ConfigError: If the architecture cannot route tokens.
    """
    check_token_routing(model.backbone)
    names, hidden = model.routed, model.backbone.hidden_size
    indices = [model.experts.index(name) for name in names]
    vectors = {
        block: torch.stack([_first_singular_vector(model, index, block, hidden) for index in indices])
        for block in range(model.first_block, model.backbone.num_blocks)
    }
    moved = {block: value.to(model.device) for block, value in vectors.items()}
    return ArrowGate(names, moved, selection=Selection(top_k=min(top_k, len(names))))


def _first_singular_vector(model: SparseExpertModel, index: int, block: int, hidden: int) -> Tensor:
    """Return the direction [H] that an expert's deltas amplify most, 0 if it has none in this block."""
    gram = torch.zeros(hidden, hidden, dtype=torch.float64)
    for name, layer in model.experts.layers.items():
        reads = name.rpartition(".")[2] in _READ_THE_INPUT and layer.in_features == hidden
        if reads and model.backbone.block_of(name) == block and layer.ranks[index]:
            lora_a, lora_b = (matrix.detach().cpu().double() for matrix in layer.get(index))
            gram += layer.scales[index] ** 2 * lora_a.t() @ (lora_b.t() @ lora_b) @ lora_a
    if not gram.any():
        return torch.zeros(hidden)
    return torch.linalg.eigh(gram).eigenvectors[:, -1].float()
