"""How familiar a text looks: its distance to the texts that the experts were trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_QUANTILES = 1001
_SHRINKAGE = 0.1
"""Of the covariance towards its diagonal, so that it can be inverted whatever the number of rows."""


class Familiarity(nn.Module):
    """The share of in-domain texts that lie as far from their nearest expert's texts as this one, or farther.

    Mahalanobis distance with one covariance for all classes: Lee et al. 2018, section 2.1,
    https://arxiv.org/abs/1807.03888. The distances of held-out texts turn it into a share, so that a threshold of 0.02
    turns away about 2 % of the texts that belong here, whatever the data.

    Args:
        num_experts: E.
        num_features: F.
    """

    means: Tensor
    whitening: Tensor
    distances: Tensor

    def __init__(self, num_experts: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(num_experts, num_features))
        self.register_buffer("whitening", torch.eye(num_features))
        self.register_buffer("distances", torch.zeros(_QUANTILES))

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` was called, or a fitted one was loaded."""
        return bool(self.distances.any())

    def fit(self, features: Sequence[Tensor], held_out: Tensor) -> None:
        """Learn the distances of texts that belong here.

        Args:
            features: Training texts of each expert, [rows, F] each, none empty.
            held_out: Texts of all experts that are in none of these, [rows, F].
        """
        means = torch.stack([rows.double().mean(0) for rows in features])
        centred = torch.cat([rows.double() - mean for rows, mean in zip(features, means, strict=True)])
        covariance = centred.t() @ centred / max(1, len(centred) - len(features))
        diagonal = torch.diag(covariance.diagonal().clamp_min(1e-6))
        covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * diagonal
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        self.means.copy_(means)
        self.whitening.copy_(torch.linalg.cholesky(inverse))  # (x - m) L has the identity as its covariance
        shares = torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)
        self.distances.copy_(torch.quantile(self._distance(held_out).double(), shares))

    def _distance(self, features: Tensor) -> Tensor:
        apart = (features.float().unsqueeze(1) - self.means) @ self.whitening  # [N, E, F]
        return apart.square().sum(-1).amin(-1)  # [N]

    def forward(self, features: Tensor) -> Tensor:
        """Return the familiarity of each row of ``features`` [N, F]: [N], 0 to 1, float32."""
        nearer = torch.searchsorted(self.distances, self._distance(features))
        return 1 - nearer.float() / _QUANTILES
