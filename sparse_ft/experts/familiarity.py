"""Familiarity: how usual a text is among the texts that a group of experts was trained on.

Shapes: N texts, G groups of experts, F features, P known pairs of tokens, Q quantiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparse_ft.progress import progress_bar

_QUANTILES = 1001
_FOLDS = 10
"""Number of parts of a group's texts, each of which is held out of one fit to calibrate the familiarity."""
_SHRINKAGE = 0.1
"""Weight of the diagonal in each covariance, which makes it invertible for any number of rows."""
_PAIR = 1 << 31
"""A pair of neighbouring tokens is stored as the number first * _PAIR + second."""

DEFAULT_MIN_FAMILIARITY = 0.005
"""Least familiarity of a text that is answered, where neither the user nor the run chose another. The largest tried
that turned away at most 1 % of the held-out texts of every public task (benchmarks/results.md)."""


class Familiarity(nn.Module):
    """The share of a group's texts that are at least as strange as a given text.

    Strangeness is the sum of two standardised numbers: the distance of the text's features to the group's texts, and
    the share of its pairs of neighbouring tokens that no training text has. The distance is Mahalanobis', see Lee et
    al. 2018, section 2.1, https://arxiv.org/abs/1807.03888, but with one covariance per group. The strangeness of each
    training text is measured by a fit without it, and ranks become shares: conformal p-values by cross-validation
    within each group, see Vovk 2015, https://doi.org/10.1007/s10472-013-9368-4. A threshold of 0.02 therefore turns
    away at most about 2 % of each group's texts, however few or varied these are. The least share is 1 / (texts + 1):
    a threshold below it turns nothing away.

    Args:
        num_groups: G.
        num_features: F.
        num_pairs: P of weights that will be loaded; ``fit`` needs none.
        by_group: Whether each group has its own calibration. Gates of version 0.1 have one for all groups, and compare
            a text with the nearest.
    """

    means: Tensor
    whitening: Tensor
    offsets: Tensor
    pairs: Tensor
    location: Tensor
    spread: Tensor
    quantiles: Tensor

    def __init__(self, num_groups: int, num_features: int, *, num_pairs: int = 0, by_group: bool = True) -> None:
        super().__init__()
        self.by_group = bool(by_group)
        calibrations = [num_groups] if by_group else []
        self.register_buffer("means", torch.zeros(num_groups, num_features))
        self.register_buffer("whitening", torch.eye(num_features).repeat(num_groups, 1, 1))
        self.register_buffer("offsets", torch.zeros(num_groups))
        self.register_buffer("pairs", torch.zeros(num_pairs, dtype=torch.long))
        self.register_buffer("location", torch.zeros(*calibrations, 2))
        self.register_buffer("spread", torch.ones(*calibrations, 2))
        self.register_buffer("quantiles", torch.zeros(*calibrations, _QUANTILES))

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` was called, or fitted weights were loaded."""
        return bool(self.quantiles.any())

    def fit(self, features: Sequence[Tensor], tokens: Sequence[Sequence[Sequence[int]]]) -> None:
        """Estimate the distribution of each group's texts, and calibrate the shares.

        Args:
            features: Features of each group's training texts, [rows, F], at least two rows.
            tokens: Token ids of the same texts, group by group.
        """
        strangeness, pairs = [torch.zeros(len(rows), 2) for rows in features], [_pairs(rows) for rows in tokens]
        with progress_bar("measuring familiarity", total=_FOLDS, unit="fold") as bar:
            for fold in range(_FOLDS):
                held_out = [torch.arange(len(rows)) % _FOLDS == fold for rows in features]
                self._fit_distributions(
                    [rows[~mask] for rows, mask in zip(features, held_out, strict=True)],
                    [_take(rows, ~mask) for rows, mask in zip(pairs, held_out, strict=True)],
                )
                for group, mask in enumerate(held_out):
                    if mask.any():
                        measured = self._strangeness(features[group][mask], _take(pairs[group], mask))
                        strangeness[group][mask] = measured[group]
                bar.update()
        self._fit_distributions(features, pairs)
        self.location.copy_(torch.stack([rows.mean(0) for rows in strangeness]))
        self.spread.copy_(torch.stack([rows.std(0, correction=0).clamp_min(1e-6) for rows in strangeness]))
        for group, rows in enumerate(strangeness):
            total = ((rows - self.location[group]) / self.spread[group]).sum(-1)
            self.quantiles[group] = _conformal_quantiles(total)

    def _fit_distributions(self, features: Sequence[Tensor], pairs: Sequence[list[Tensor]]) -> None:
        """Estimate mean and covariance of each group's texts, and collect the pairs of tokens of all texts."""
        means = torch.stack([rows.double().mean(0) for rows in features])
        scatters = [
            (rows.double() - mean).t() @ (rows.double() - mean) for rows, mean in zip(features, means, strict=True)
        ]
        pooled = torch.stack(scatters).sum(0) / sum(len(rows) for rows in features)
        for group, (rows, scatter) in enumerate(zip(features, scatters, strict=True)):
            # The pooled covariance has the weight of F rows: Friedman 1989, regularised discriminant analysis,
            # https://doi.org/10.1080/01621459.1989.10478752
            covariance = (scatter + len(pooled) * pooled) / (len(rows) + len(pooled))
            diagonal = torch.diag(covariance.diagonal().clamp_min(1e-6))
            factor = torch.linalg.cholesky((1 - _SHRINKAGE) * covariance + _SHRINKAGE * diagonal)
            self.whitening[group] = torch.linalg.cholesky(torch.cholesky_inverse(factor))  # (x - m) W is white
            self.offsets[group] = 2 * factor.diagonal().log().sum()  # log determinant
        self.means.copy_(means)
        self.pairs = torch.cat([row for rows in pairs for row in rows]).unique().to(self.pairs.device)  # sorted

    def distances(self, features: Tensor) -> Tensor:
        """Return -2 log of each group's normal density, up to a constant: [N, F] to [G, N]."""
        whitened = (features.float().unsqueeze(0) - self.means.unsqueeze(1)) @ self.whitening  # [G, N, F]
        return whitened.square().sum(-1) + self.offsets.unsqueeze(1)

    def novelty(self, rows: list[Tensor]) -> Tensor:
        """Return the share of each text's pairs of neighbouring tokens that no training text has, [N].

        Args:
            rows: The pairs of each text, as numbers.
        """
        keys = torch.cat(rows).to(self.pairs.device)
        if not len(self.pairs):
            return torch.ones(len(rows), device=keys.device)
        index = torch.searchsorted(self.pairs, keys).clamp_max(len(self.pairs) - 1)
        unseen = (self.pairs[index] != keys).float().split([len(row) for row in rows])
        return torch.stack([row.sum() / max(1, len(row)) for row in unseen])

    def _strangeness(self, features: Tensor, pairs: list[Tensor]) -> Tensor:
        distances = self.distances(features)
        return torch.stack([distances, self.novelty(pairs).expand_as(distances)], -1)  # [G, N, 2]

    def forward(self, features: Tensor, tokens: Sequence[Sequence[int]], *, groups: Tensor) -> Tensor:
        """Return the familiarity of texts.

        Args:
            features: [N, F].
            tokens: Token ids of each text, N sequences.
            groups: [N], int64, the group that each text is compared with.

        Returns:
            [N], 0 to 1, float32.
        """
        strangeness = self._strangeness(features, _pairs(tokens))
        if not self.by_group:
            total = ((strangeness - self.location) / self.spread).sum(-1).amin(0)  # [N]
            return 1 - torch.searchsorted(self.quantiles, total).float() / _QUANTILES
        compared = strangeness[groups, torch.arange(len(groups), device=groups.device)]  # [N, 2]
        total = ((compared - self.location[groups]) / self.spread[groups]).sum(-1, keepdim=True)  # [N, 1]
        below = torch.searchsorted(self.quantiles[groups], total).squeeze(-1)
        return 1 - below.float() / _QUANTILES


def _conformal_quantiles(values: Tensor) -> Tensor:
    """Return [Q] ascending bounds: of values like these [n], a share of i / Q or more lies at or below the i-th.

    The bound is the value of rank i / Q * (n + 1), rounded up; the largest float where there is no such rank.
    """
    ordered = torch.cat([values.sort().values, torch.tensor([torch.finfo(torch.float32).max])])
    ranks = (torch.arange(1, _QUANTILES + 1) * (len(values) + 1) + _QUANTILES - 1) // _QUANTILES  # from 1
    return ordered[(ranks - 1).clamp_max(len(values))]


def _take(rows: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    return [row for row, chosen in zip(rows, mask.tolist(), strict=True) if chosen]


def _pairs(tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """Number the pairs of neighbouring tokens of each text."""
    rows = [torch.tensor(row, dtype=torch.long) for row in tokens]
    return [row[:-1] * _PAIR + row[1:] for row in rows]
