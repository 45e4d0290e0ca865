"""Pool the hidden states of a text into one vector."""

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the mean square, so that a mean of zeros is not divided by zero."""


def pool(hidden: Tensor, attention_mask: Tensor, how: str) -> Tensor:
    """Reduce the hidden states of each row to one vector; padding never counts.

    Args:
        hidden: [N, S, hidden].
        attention_mask: [N, S], 1 for real tokens, at least one a row, padding on the right.
        how: ``first`` or ``last`` real token; the ``mean`` of all; or ``unit``, the mean scaled to a mean square of 1,
            so that texts differ only in direction, as in sentence-transformers.

    Returns:
        [N, hidden] in float32.
    """
    if how == "first":
        return hidden[:, 0].float()
    if how == "last":
        last = attention_mask.sum(1) - 1  # [N]
        rows = torch.arange(hidden.shape[0], device=hidden.device)  # len() would be a constant when traced
        return hidden[rows, last].float()
    weights = attention_mask.unsqueeze(-1).float()  # [N, S, 1]
    mean = (hidden.float() * weights).sum(1) / weights.sum(1)
    return mean * (mean.square().mean(-1, keepdim=True) + EPSILON).rsqrt() if how == "unit" else mean
