import numpy as np
import pytest
import scipy.stats
import torch

from distil_rank.core.errors import InputError
from distil_rank.core.intervals import (
    bootstrap_counts,
    mean_interval,
    percentile_interval,
    ratio_interval,
    t_interval,
    weighted_quantile,
)


def test_counts_are_draws_with_replacement(source):
    counts = bootstrap_counts(200, 500, source)
    assert counts.shape == (500, 200) and bool((counts.sum(1) == 200).all())
    assert float(counts.mean()) == 1
    assert float(counts.var()) == pytest.approx(1 - 1 / 200, rel=0.05)  # multinomial


def test_t_interval_is_scipys():
    values = [0.1, 0.3, 0.2, 0.25]
    expected = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    assert t_interval([0.4]) == (0.4, 0.4)


def test_bootstrap_interval_of_a_mean_covers_it_about_95_times_in_100():
    g = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(200):
        x = torch.randn(100, generator=g, dtype=torch.float64)
        low, high = percentile_interval(bootstrap_counts(100, 300, g) @ x / 100)
        covered += low < 0 < high
    assert 178 <= covered <= 198


def test_weighted_quantile_is_the_quantile_of_the_repeated_values(source):
    values = torch.randn(60, generator=source, dtype=torch.float64)
    counts = bootstrap_counts(60, 20, source)
    for draw, found in zip(counts, weighted_quantile(values, counts, 0.1)):
        repeated = values.repeat_interleave(draw.long()).numpy()
        assert float(found) == np.quantile(repeated, 0.1, method="inverted_cdf")


def test_ratio_interval_has_the_clusters_as_its_units():
    """One value a cluster of size one: Student's interval; residues of one protein are one unit."""
    values = np.array([0.1, 0.3, 0.2, 0.25])
    ratio, low, high = ratio_interval(values, np.ones(4), np.arange(4))
    assert (low, high) == pytest.approx(t_interval(values)) and ratio == pytest.approx(
        values.mean()
    )
    repeated = ratio_interval(np.repeat(values, 9), np.ones(36), np.repeat(np.arange(4), 9))
    assert repeated == pytest.approx((ratio, low, high))
    with pytest.raises(InputError, match="two proteins"):
        ratio_interval(values, np.ones(4), np.zeros(4, dtype=int))


def test_mean_interval_is_a_bootstrap_of_the_mean(source):
    found = mean_interval([0.1, 0.3, 0.2, 0.25] * 20, source, True)
    low, high = t_interval([0.1, 0.3, 0.2, 0.25] * 20)
    assert found["value"] == pytest.approx(0.2125) and found["n"] == 80
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=2e-3)
