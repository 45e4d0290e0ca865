"""Familiarity: how close a text is to the texts that the experts were trained on.

Shapes: N texts, E experts, F features, P known pairs of tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_QUANTILES = 1001
_SHRINKAGE = 0.1
"""Weight of the diagonal in each covariance, which makes it invertible for any number of rows."""
_PAIR = 1 << 31
"""A pair of neighbouring tokens is stored as the number first * _PAIR + second."""


class Familiarity(nn.Module):
    """The share of in-domain texts that are at least as strange as a given text.

    Strangeness is the sum of two standardised numbers: the distance of the text's features to the nearest expert's
    texts, and the share of its pairs of neighbouring tokens that no training text has. The distance is Mahalanobis',
    see Lee et al. 2018, section 2.1, https://arxiv.org/abs/1807.03888, but with one covariance per expert. Held-out
    texts turn the sum into a share, so a threshold of 0.02 rejects about 2 % of in-domain texts, whatever the data.

    Args:
        num_experts: E.
        num_features: F.
        num_pairs: P of weights that will be loaded; ``fit`` needs none.
    """

    means: Tensor
    whitening: Tensor
    offsets: Tensor
    pairs: Tensor
    location: Tensor
    spread: Tensor
    quantiles: Tensor

    def __init__(self, num_experts: int, num_features: int, *, num_pairs: int = 0) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(num_experts, num_features))
        self.register_buffer("whitening", torch.eye(num_features).repeat(num_experts, 1, 1))
        self.register_buffer("offsets", torch.zeros(num_experts))
        self.register_buffer("pairs", torch.zeros(num_pairs, dtype=torch.long))
        self.register_buffer("location", torch.zeros(2))
        self.register_buffer("spread", torch.ones(2))
        self.register_buffer("quantiles", torch.zeros(_QUANTILES))

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` was called, or fitted weights were loaded."""
        return bool(self.quantiles.any())

    def fit(
        self,
        features: Sequence[Tensor],
        tokens: Sequence[Sequence[int]],
        *,
        held_out: Tensor,
        held_out_tokens: Sequence[Sequence[int]],
    ) -> None:
        """Estimate the distribution of in-domain texts.

        Args:
            features: Features of each expert's training texts, [rows, F], none empty.
            tokens: Token ids of the same texts, of one expert after another.
            held_out: Features of further texts of all experts, [rows, F].
            held_out_tokens: Token ids of these texts.
        """
        means = torch.stack([rows.double().mean(0) for rows in features])
        scatters = [
            (rows.double() - mean).t() @ (rows.double() - mean) for rows, mean in zip(features, means, strict=True)
        ]
        pooled = torch.stack(scatters).sum(0) / sum(len(rows) for rows in features)
        for expert, (rows, scatter) in enumerate(zip(features, scatters, strict=True)):
            # The pooled covariance has the weight of F rows: Friedman 1989, regularised discriminant analysis,
            # https://doi.org/10.1080/01621459.1989.10478752
            covariance = (scatter + len(pooled) * pooled) / (len(rows) + len(pooled))
            diagonal = torch.diag(covariance.diagonal().clamp_min(1e-6))
            factor = torch.linalg.cholesky((1 - _SHRINKAGE) * covariance + _SHRINKAGE * diagonal)
            self.whitening[expert] = torch.linalg.cholesky(torch.cholesky_inverse(factor))  # (x - m) W is white
            self.offsets[expert] = 2 * factor.diagonal().log().sum()  # log determinant
        self.means.copy_(means)
        self.pairs = torch.cat([_pairs(row) for row in tokens]).unique().to(self.pairs.device)  # sorted
        strangeness = self._strangeness(held_out, held_out_tokens)
        self.location.copy_(strangeness.mean(0))
        self.spread.copy_(strangeness.std(0, correction=0).clamp_min(1e-6))
        shares = torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)
        self.quantiles.copy_(torch.quantile(self._total(strangeness).double(), shares))

    def distance(self, features: Tensor) -> Tensor:
        """Return -2 log of the highest normal density among the experts, up to a constant: [N, F] to [N]."""
        whitened = (features.float().unsqueeze(0) - self.means.unsqueeze(1)) @ self.whitening  # [E, N, F]
        return (whitened.square().sum(-1) + self.offsets.unsqueeze(1)).amin(0)

    def novelty(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return the share of each text's pairs of neighbouring tokens that no training text has, [N]."""
        rows = [_pairs(row) for row in tokens]
        keys = torch.cat(rows).to(self.pairs.device)
        if not len(self.pairs):
            return torch.ones(len(rows), device=keys.device)
        index = torch.searchsorted(self.pairs, keys).clamp_max(len(self.pairs) - 1)
        unseen = (self.pairs[index] != keys).float().split([len(row) for row in rows])
        return torch.stack([row.sum() / max(1, len(row)) for row in unseen])

    def _strangeness(self, features: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([self.distance(features), self.novelty(tokens)], -1)  # [N, 2]

    def _total(self, strangeness: Tensor) -> Tensor:
        return ((strangeness - self.location) / self.spread).sum(-1)

    def forward(self, features: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return the familiarity of texts.

        Args:
            features: [N, F].
            tokens: Token ids of each text, N sequences.

        Returns:
            [N], 0 to 1, float32.
        """
        below = torch.searchsorted(self.quantiles, self._total(self._strangeness(features, tokens)))
        return 1 - below.float() / _QUANTILES


def _pairs(tokens: Sequence[int]) -> Tensor:
    ids = torch.tensor(tokens, dtype=torch.long)
    return ids[:-1] * _PAIR + ids[1:]
