"""Calibration on simulated models whose calibration is known."""

import numpy as np
import pytest

from distil_rank.generators.calibration import bins_of, calibration


def simulate(n, seed, shift=0.0):
    """A model right with probability confidence - shift; confidences like a protein model's."""
    rng = np.random.default_rng(seed)
    confidence = 0.08 + 0.9 * rng.beta(1.0, 4.0, n)
    correct = (rng.random(n) < np.clip(confidence - shift, 0, 1)).astype(float)
    return confidence, correct, np.arange(n) // 20


@pytest.mark.parametrize("gap", [0.0, 0.01, 0.04])
def test_intervals_cover_the_true_error_at_the_null_and_off_it(gap):
    found = [calibration(*simulate(2000, 1000 + run, gap))["error"] for run in range(150)]
    covered = np.mean([f["low"] <= gap <= f["high"] for f in found])
    assert 0.95 - 2.5 * np.sqrt(0.95 * 0.05 / 150) <= covered
    assert all(f["low"] <= f["value"] <= f["high"] for f in found)


def test_overconfidence_is_found_with_its_sign_and_size():
    for shift in (0.05, -0.02):
        found = calibration(*simulate(20000, 7, shift))
        assert found["signed_gap"]["low"] < shift < found["signed_gap"]["high"]
        assert found["error"]["value"] == pytest.approx(abs(shift), abs=0.008)
        assert found["error"]["low"] > 0


def test_perfect_and_constant_models():
    ones = np.ones(50)
    found = calibration(ones, ones, np.arange(50))["error"]
    assert found["value"] == found["low"] == found["high"] == 0
    found = calibration(ones, 0 * ones, np.arange(50))
    assert found["error"]["value"] == 1 and found["signed_gap"]["value"] == 1


def test_bins_hold_as_many_tokens_as_ties_allow():
    confidence = np.random.default_rng(0).random(1000)
    place = bins_of(confidence)
    assert np.bincount(place).tolist() == [100] * 10
    assert all(confidence[place == b].max() < confidence[place == b + 1].min() for b in range(9))
    assert np.bincount(bins_of(np.repeat([0.1, 0.5], [70, 30]))).tolist() == [70, 30]
