"""Familiarity: a calibrated strangeness against what the experts were trained on."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from sparse_ft.experts.familiarity import Familiarity

FEATURES = 12
ROWS, HELD_OUT, FRESH = 400, 300, 1000


@pytest.fixture(scope="module")
def clusters():
    """Three clusters of unlike covariance: training rows of each, held-out and fresh rows of all, and the means."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, FEATURES, FEATURES, generator=generator)
    means = torch.randn(3, FEATURES, generator=generator) * 8

    def draw(number):
        return [
            mean + torch.randn(number, FEATURES, generator=generator) @ matrix
            for mean, matrix in zip(means, mixing, strict=True)
        ]

    return draw(ROWS), torch.cat(draw(HELD_OUT)), torch.cat(draw(FRESH)), means


def sentences(number, *, words=range(6), seed=0):
    """Token ids whose neighbours are next to each other in ``words``, with a surprise now and then."""
    generator = torch.Generator().manual_seed(seed)
    words, rows = list(words), []
    for start, surprise in torch.randint(0, 1000, (number, 2), generator=generator).tolist():
        row = [words[(start + index) % len(words)] for index in range(8)]
        row[surprise % 8] = words[surprise % len(words)]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def fitted(clusters):
    train, held_out, _, _ = clusters
    familiarity = Familiarity(3, FEATURES)
    assert not familiarity.fitted
    familiarity.fit(
        train, sentences(100), held_out=held_out, held_out_tokens=sentences(3 * HELD_OUT, words=range(7), seed=1)
    )
    return familiarity


def test_a_threshold_turns_away_that_share_of_what_belongs_here(fitted, clusters):
    confidence = fitted(clusters[2], sentences(3 * FRESH, words=range(7), seed=2))
    assert fitted.fitted
    assert confidence.shape == (3 * FRESH,)
    assert 0 <= confidence.min() <= confidence.max() <= 1
    for share in (0.02, 0.1, 0.5):
        assert abs(float((confidence < share).float().mean()) - share) < 0.03


def test_what_lies_far_from_all_is_turned_away_and_a_mean_is_not(fitted, clusters):
    means = clusters[3]
    known = sentences(3)
    assert (fitted(means, known) > 0.9).all()
    assert (fitted(means + 100, known) == 0).all()
    assert fitted(means.mean(0, keepdim=True), known[:1]).item() < 0.02  # between the clusters


def test_pairs_of_tokens_that_no_text_had_make_a_text_less_familiar(fitted, clusters):
    means = clusters[3]
    known, unknown = [list(range(6))] * 3, [list(range(50, 56))] * 3
    assert fitted.novelty(known).tolist() == [0, 0, 0]
    assert fitted.novelty(unknown).tolist() == [1, 1, 1]
    assert fitted.novelty([[0, 1, 50, 51, 0]]).item() == pytest.approx(3 / 4)
    assert fitted.novelty([[0], []]).tolist() == [0, 0]
    assert (fitted(means, unknown) < fitted(means, known)).all()


def test_the_distance_is_minus_twice_the_log_density_of_the_nearest_expert(fitted, clusters):
    train, _, fresh, _ = clusters
    rows = [part.double().numpy() for part in train]
    scatters = [np.cov(part.T, bias=True) * len(part) for part in rows]
    shared = sum(scatters) / (3 * ROWS)
    densities = []
    for part, scatter in zip(rows, scatters, strict=True):
        covariance = (scatter + FEATURES * shared) / (ROWS + FEATURES)
        covariance = 0.9 * covariance + 0.1 * np.diag(np.diag(covariance))
        densities.append(multivariate_normal(part.mean(0), covariance).logpdf(fresh[:50].double().numpy()))
    expected = -2 * torch.from_numpy(np.stack(densities)).max(0).values - FEATURES * np.log(2 * np.pi)
    torch.testing.assert_close(fitted.distance(fresh[:50]).double(), expected, rtol=1e-3, atol=1e-2)


def test_an_answer_does_not_depend_on_the_other_texts(fitted, clusters):
    fresh, tokens = clusters[2][:6], [*sentences(4), [7], [1, 2, 60]]
    together = fitted(fresh, tokens)
    alone = torch.cat([fitted(fresh[index : index + 1], [tokens[index]]) for index in range(6)])
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=0)


def test_fewer_rows_than_features_are_enough():
    familiarity = Familiarity(2, 50)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, 50, generator=generator), torch.randn(4, 50, generator=generator) + 9]
    held_out = torch.randn(3, 50, generator=generator)
    familiarity.fit(rows, [[1, 2]] * 9, held_out=held_out, held_out_tokens=[[1, 2]] * 3)
    assert torch.isfinite(familiarity.distance(torch.randn(7, 50, generator=generator))).all()
    assert torch.isfinite(familiarity(torch.randn(7, 50, generator=generator), [[3, 4]] * 7)).all()


def test_texts_of_one_token_alone_can_be_learnt_from():
    familiarity = Familiarity(1, 2)
    rows = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    familiarity.fit([rows], [[5]] * 9, held_out=rows, held_out_tokens=[[5]] * 9)
    assert len(familiarity.pairs) == 0
    assert familiarity(rows, [[5]] * 9).isfinite().all()
