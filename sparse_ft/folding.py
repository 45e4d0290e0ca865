"""A backbone with an expert folded into its weights, which any library can run: W + alpha / r * B A."""

import torch

from sparse_ft.backbone.backbone import Backbone, load_backbone
from sparse_ft.experts.named_experts import Expert


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
