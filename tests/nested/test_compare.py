"""Aggregation equals hand-computed figures."""

import numpy as np
import pytest

from distil_rank.nested.compare import compare, holm, mean_interval, monotonicity, spearman, wilcoxon, wilson, win_rate

OURS = [0.50, 0.40, 0.30, 0.60, 0.20]
THEIRS = [0.45, 0.42, 0.30, 0.50, 0.12]


def test_hand_computed_fixture():
    (row,) = compare({"a": OURS, "b": THEIRS}, [("a", "b")], seed=0)
    assert row["difference"]["value"] == pytest.approx((0.05 - 0.02 + 0 + 0.10 + 0.08) / 5)
    assert row["win_rate"]["value"] == pytest.approx(3.5 / 5)  # three wins, one tie, one loss
    # signed ranks of .05 -.02 .10 .08 (the zero is dropped): 2, -1, 4, 3; W- = 1; P(W- <= 1) = 2 / 16, two-sided 4 / 16
    assert row["wilcoxon_p"] == pytest.approx(4 / 16)
    assert row["holm_p"] == row["wilcoxon_p"]
    assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == pytest.approx([0.02])


def test_wilson_by_hand():
    # n = 10, 8 wins, z = 1.96: centre (.8 + .19207) / 1.38415, half 1.96 / 1.38415 sqrt(.016 + .0096)
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson(0, 12)[0] == pytest.approx(0) and wilson(12, 12)[1] == pytest.approx(1)


def test_ties_and_constants():
    assert wilcoxon(OURS, OURS) == 1.0
    assert win_rate(OURS, OURS)["value"] == 0.5
    assert spearman(np.ones(5), OURS) == 0.0
    assert spearman(OURS, [2 * x for x in OURS]) == pytest.approx(1)
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


def test_monotonicity_by_hand():
    result = monotonicity([[0.1, 0.2, 0.3], [0.2, 0.2, 0.2], [0.3, 0.4, 0.5]], seed=0)
    assert result["monotone"]["value"] == pytest.approx(2 / 3)
    assert [s["value"] for s in result["steps"]] == pytest.approx([0.0, 0.2])


def test_bootstrap_covers():
    rng = np.random.default_rng(0)
    covered = [r["low"] <= 0 <= r["high"] for r in (mean_interval(rng.standard_normal(12), 0) for _ in range(200))]
    assert 0.86 <= np.mean(covered) <= 0.99  # a percentile bootstrap of 12 values is a little narrow


def test_an_effect_and_no_effect():
    rng = np.random.default_rng(1)
    base = rng.uniform(0.2, 0.6, 12)
    shifted, noisy = base + 0.05 + 0.01 * rng.standard_normal(12), base + 0.02 * rng.standard_normal(12)
    yes, no = compare({"s": shifted, "n": noisy, "b": base}, [("s", "b"), ("n", "b")], seed=0)
    assert yes["holm_p"] < 0.01 and yes["win_rate"]["low"] > 0.5
    assert no["holm_p"] > 0.05 and no["difference"]["low"] < 0 < no["difference"]["high"]
