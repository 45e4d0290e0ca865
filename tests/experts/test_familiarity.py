"""Familiarity: a calibrated strangeness against what the experts were trained on."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from sparse_ft.experts.familiarity import Familiarity, _pairs

FEATURES = 12
ROWS, FRESH = 400, 1000


@pytest.fixture(scope="module")
def clusters():
    """Three clusters of unlike covariance: training rows of each, fresh rows of all, and the means."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, FEATURES, FEATURES, generator=generator)
    means = torch.randn(3, FEATURES, generator=generator) * 8

    def draw(number):
        return [
            mean + torch.randn(number, FEATURES, generator=generator) @ matrix
            for mean, matrix in zip(means, mixing, strict=True)
        ]

    return draw(ROWS), torch.cat(draw(FRESH)), means


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
    train, _, _ = clusters
    familiarity = Familiarity(3, FEATURES)
    assert not familiarity.fitted
    familiarity.fit(train, [sentences(ROWS, words=range(7), seed=seed) for seed in range(3)])
    return familiarity


def nearest(familiarity, features, tokens):
    """Return the familiarity of texts with the group that they are nearest to."""
    return familiarity(features, tokens, groups=familiarity.distances(features).argmin(0))


def test_a_threshold_turns_away_that_share_of_what_belongs_here(fitted, clusters):
    assert fitted.fitted
    for group, rows in enumerate(clusters[1].split(FRESH)):
        confidence = fitted(
            rows, sentences(FRESH, words=range(7), seed=9 + group), groups=torch.full((FRESH,), group, dtype=torch.long)
        )
        assert confidence.shape == (FRESH,)
        assert 0 <= confidence.min() <= confidence.max() <= 1
        for share in (0.02, 0.1, 0.5):
            assert abs(float((confidence < share).float().mean()) - share) < 0.05


def test_a_small_group_of_varied_texts_loses_no_more_of_its_own_than_a_large_group():
    """640 rows of 64 classes, beside 3,000 rows of one: the number means the share of each group's own texts."""
    generator = torch.Generator().manual_seed(1)
    centres = 3 * torch.randn(64, 32, generator=generator)

    def draw(rows):
        return centres.repeat(rows // 64, 1) + torch.randn(rows, 32, generator=generator)

    def words(rows, size):  # each class has words of its own
        classes = torch.arange(rows) % 64 if size > 9 else torch.zeros(rows, dtype=torch.long)
        return (classes.unsqueeze(1) * size + torch.randint(size, (rows, 6), generator=generator)).tolist()

    familiarity = Familiarity(2, 32)
    large = 20 + torch.randn(3000, 32, generator=generator)
    familiarity.fit([draw(640), large], [words(640, 10), words(3000, 5)])
    own = familiarity(draw(1280), words(1280, 10), groups=torch.zeros(1280, dtype=torch.long))
    for share in (0.01, 0.02, 0.05):
        assert share / 8 < float((own < share).float().mean()) < 1.6 * share


def test_the_least_share_is_that_of_one_text_more_than_there_are():
    generator = torch.Generator().manual_seed(0)
    familiarity = Familiarity(1, 3)
    familiarity.fit([torch.randn(40, 3, generator=generator)], [[[1, 2]] * 40])
    far = familiarity(torch.full((1, 3), 1e3), [[1, 2]], groups=torch.zeros(1, dtype=torch.long))
    assert 1 / 41 <= far.item() < 1 / 41 + 1 / 1001  # of 40 texts none says anything about one in a hundred


def test_what_lies_far_from_all_is_turned_away_and_a_mean_is_not(fitted, clusters):
    means = clusters[2]
    known = sentences(3)
    assert (nearest(fitted, means, known) > 0.9).all()
    assert (nearest(fitted, means + 100, known) < 2 / ROWS).all()
    assert nearest(fitted, means.mean(0, keepdim=True), known[:1]).item() < 0.02  # between the clusters


def test_pairs_of_tokens_that_no_text_had_make_a_text_less_familiar(fitted, clusters):
    means = clusters[2]
    known, unknown = [list(range(6))] * 3, [list(range(50, 56))] * 3
    assert fitted.novelty(_pairs(known)).tolist() == [0, 0, 0]
    assert fitted.novelty(_pairs(unknown)).tolist() == [1, 1, 1]
    assert fitted.novelty(_pairs([[0, 1, 50, 51, 0]])).item() == pytest.approx(3 / 4)
    assert fitted.novelty(_pairs([[0], []])).tolist() == [0, 0]
    assert (nearest(fitted, means, unknown) < nearest(fitted, means, known)).all()


def test_the_distance_is_minus_twice_the_log_density_of_each_group(fitted, clusters):
    train, fresh, _ = clusters
    rows = [part.double().numpy() for part in train]
    scatters = [np.cov(part.T, bias=True) * len(part) for part in rows]
    shared = sum(scatters) / (3 * ROWS)
    densities = []
    for part, scatter in zip(rows, scatters, strict=True):
        covariance = (scatter + FEATURES * shared) / (ROWS + FEATURES)
        covariance = 0.9 * covariance + 0.1 * np.diag(np.diag(covariance))
        densities.append(multivariate_normal(part.mean(0), covariance).logpdf(fresh[:50].double().numpy()))
    expected = -2 * torch.from_numpy(np.stack(densities)) - FEATURES * np.log(2 * np.pi)
    torch.testing.assert_close(fitted.distances(fresh[:50]).double(), expected, rtol=1e-3, atol=1e-2)


def test_an_answer_does_not_depend_on_the_other_texts(fitted, clusters):
    fresh, tokens = clusters[1][:6], [*sentences(4), [7], [1, 2, 60]]
    together = nearest(fitted, fresh, tokens)
    alone = torch.cat([nearest(fitted, fresh[index : index + 1], [tokens[index]]) for index in range(6)])
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=0)


def test_fewer_rows_than_features_are_enough():
    familiarity = Familiarity(2, 50)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, 50, generator=generator), torch.randn(2, 50, generator=generator) + 9]
    familiarity.fit(rows, [[[1, 2]] * 5, [[1, 2]] * 2])
    assert torch.isfinite(familiarity.distances(torch.randn(7, 50, generator=generator))).all()
    assert torch.isfinite(nearest(familiarity, torch.randn(7, 50, generator=generator), [[3, 4]] * 7)).all()
    assert all(value.isfinite().all() for value in familiarity.state_dict().values())


def test_texts_of_one_token_alone_can_be_learnt_from():
    familiarity = Familiarity(1, 2)
    rows = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    familiarity.fit([rows], [[[5]] * 9])
    assert len(familiarity.pairs) == 0
    assert nearest(familiarity, rows, [[5]] * 9).isfinite().all()


def test_gates_of_version_0_1_have_one_calibration_for_all_groups():
    """The text is compared with the nearest group, and the total with 1,001 quantiles of all held-out texts."""
    old = Familiarity(2, 2, num_pairs=0, by_group=False)
    old.load_state_dict(
        {
            **old.state_dict(),
            "means": torch.tensor([[0.0, 0.0], [8.0, 0.0]]),
            "location": torch.tensor([1.0, 0.5]),
            "spread": torch.tensor([2.0, 0.5]),
            "quantiles": torch.linspace(0, 10, 1001),
        }
    )
    # Distance 9 to the second group, the nearest; without known pairs the novelty is 1: (9 - 1) / 2 + (1 - 0.5) / 0.5.
    familiarity = old(torch.tensor([[8.0, 3.0]]), [[1, 2]], groups=torch.zeros(1, dtype=torch.long))
    assert familiarity.item() == pytest.approx(1 - 500 / 1001)
