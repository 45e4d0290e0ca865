"""Familiarity: a calibrated distance to what the experts were trained on."""

import pytest
import torch

from sparse_ft.familiarity import Familiarity

FEATURES = 12


@pytest.fixture(scope="module")
def clusters():
    """Three clusters with one covariance: training rows of each, held-out rows and fresh rows of all."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator)
    means = torch.randn(3, FEATURES, generator=generator) * 8

    def draw(number):
        return [mean + torch.randn(number, FEATURES, generator=generator) @ mixing for mean in means]

    return draw(400), torch.cat(draw(300)), torch.cat(draw(1000)), means


@pytest.fixture(scope="module")
def fitted(clusters):
    train, held_out, _, _ = clusters
    familiarity = Familiarity(3, FEATURES)
    assert not familiarity.fitted
    familiarity.fit(train, held_out)
    return familiarity


def test_a_threshold_turns_away_that_share_of_what_belongs_here(fitted, clusters):
    confidence = fitted(clusters[2])
    assert fitted.fitted
    assert confidence.shape == (3000,)
    assert 0 <= confidence.min() <= confidence.max() <= 1
    for share in (0.02, 0.1, 0.5):
        assert abs(float((confidence < share).float().mean()) - share) < 0.03


def test_what_lies_far_from_all_is_turned_away_and_a_mean_is_not(fitted, clusters):
    means = clusters[3]
    assert (fitted(means) > 0.9).all()
    assert (fitted(means + 100) == 0).all()
    assert fitted(means.mean(0, keepdim=True)).item() < 0.02  # between the clusters


def test_the_distance_is_that_of_mahalanobis_with_a_shrunken_covariance(fitted, clusters):
    train, _, fresh, _ = clusters
    centred = torch.cat([rows.double() - rows.double().mean(0) for rows in train])
    covariance = centred.T @ centred / (len(centred) - 3)
    inverse = torch.linalg.inv(0.9 * covariance + 0.1 * torch.diag(covariance.diagonal()))
    apart = fresh[:50].double().unsqueeze(1) - torch.stack([rows.double().mean(0) for rows in train])
    expected = torch.einsum("nef,fg,neg->ne", apart, inverse, apart).min(1).values
    torch.testing.assert_close(fitted._distance(fresh[:50]).double(), expected, rtol=1e-3, atol=1e-3)


def test_fewer_rows_than_features_are_enough():
    familiarity = Familiarity(2, 50)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, 50, generator=generator), torch.randn(4, 50, generator=generator) + 9]
    familiarity.fit(rows, torch.randn(3, 50, generator=generator))
    assert torch.isfinite(familiarity(torch.randn(7, 50, generator=generator))).all()
