"""Calibration on simulated models whose calibration is known."""

import numpy as np
import pytest

from distil_rank.core.errors import InputError
from distil_rank.core.intervals import ratio_interval
from distil_rank.generators.calibration import best_temperature, calibration, folded_mean


def simulate(n, seed, shift=0.0):
    """A model right with probability confidence - shift; confidences like a protein model's."""
    rng = np.random.default_rng(seed)
    confidence = 0.08 + 0.9 * rng.beta(1.0, 4.0, n)
    correct = (rng.random(n) < np.clip(confidence - shift, 0, 1)).astype(float)
    return confidence, correct, (confidence - correct) ** 2, np.arange(n) // 20


@pytest.mark.parametrize("n,runs", [(100, 400), (2000, 400), (20000, 150)])
def test_a_calibrated_model_has_debiased_ece_zero_and_intervals_that_cover_it(n, runs):
    found = [calibration(*simulate(n, 1000 + run)) for run in range(runs)]
    debiased = np.array([f["ece_debiased"]["value"] for f in found])
    assert abs(debiased.mean()) < 2 * debiased.std() / np.sqrt(runs) + 0.02 * np.mean(
        [f["ece"] for f in found]
    )
    assert np.mean(np.abs(debiased) < 2 * debiased.std()) > 0.93
    plain = np.array([f["ece"] for f in found])
    assert plain.min() > 0 and np.mean([f["noise_floor"] for f in found]) == pytest.approx(
        plain.mean(), rel=0.1
    )
    covered = np.mean([f["ece_debiased"]["low"] <= 0 <= f["ece_debiased"]["high"] for f in found])
    signed = np.mean([f["signed_gap"]["low"] <= 0 <= f["signed_gap"]["high"] for f in found])
    slack = 2 * np.sqrt(0.95 * 0.05 / runs)  # of a coverage estimated from this many runs
    assert 0.93 - slack <= covered <= 0.97 + slack
    assert 0.93 - slack <= signed <= 0.97 + slack


def test_overconfidence_is_found_with_its_sign_and_size():
    for shift in (0.05, -0.02):
        found = calibration(*simulate(20000, 7, shift))
        assert found["signed_gap"]["low"] < shift < found["signed_gap"]["high"]
        assert found["ece_debiased"]["value"] == pytest.approx(abs(shift), abs=0.008)
        assert found["ece_debiased"]["low"] > 0


def test_interval_of_the_debiased_ece_covers_a_known_miscalibration():
    found = [calibration(*simulate(20000, 5000 + run, 0.06))["ece_debiased"] for run in range(100)]
    truth = np.mean([calibration(*simulate(2_000_000, 3, 0.06))["ece"]])
    covered = np.mean([f["low"] <= truth <= f["high"] for f in found])
    assert covered >= 0.9


def test_perfect_and_constant_models():
    ones = np.ones(50)
    found = calibration(ones, ones, 0 * ones, np.arange(50))
    assert found["ece"] == 0 and found["noise_floor"] == 0 and found["mce"] == 0
    found = calibration(ones, 0 * ones, 2 * ones, np.arange(50))
    assert (
        found["ece"] == 1
        and found["signed_gap"]["value"] == 1
        and found["ece_debiased"]["value"] == 1
    )


def test_bins_are_those_of_the_definition():
    confidence = np.array([0.05, 0.15, 0.15, 1.0])
    correct = np.array([0.0, 1.0, 0.0, 1.0])
    found = calibration(confidence, correct, 0 * correct, np.arange(4))
    assert found["ece"] == pytest.approx((0.05 * 1 + 0.35 * 2 + 0 * 1) / 4)
    assert found["mce"] == pytest.approx(0.35)


def test_folded_mean_by_simulation():
    draws = np.abs(np.random.default_rng(0).normal(0.7, 1.3, 400_000))
    assert folded_mean(np.array([0.7, -0.7]), np.array([1.3, 1.3])) == pytest.approx(
        [draws.mean()] * 2, rel=5e-3
    )
    assert folded_mean(np.array([-2.0]), np.array([0.0])) == pytest.approx([2.0])


def test_error_of_a_ratio_knows_that_tokens_of_a_protein_hang_together():
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(300):
        sizes = rng.integers(5, 40, 60)
        level = rng.normal(2, 0.5, 60)
        protein = np.repeat(np.arange(60), sizes)
        values = level[protein] + rng.normal(0, 0.1, len(protein))
        ratio, low, high = ratio_interval(values, np.ones(len(protein)), protein)
        ratios.append(ratio)
        errors.append((high - low) / 4)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.12)


def test_temperature_of_a_parabola_is_found_between_grid_points():
    grid = np.geomspace(0.5, 2, 9)
    assert best_temperature(grid, (np.log(grid) - np.log(1.23)) ** 2 + 2) == pytest.approx(1.23)
    assert best_temperature(grid, grid) == pytest.approx(0.5, rel=0.2)


def test_no_tokens_are_refused():
    empty = np.empty(0)
    with pytest.raises(InputError, match="at least one token"):
        calibration(empty, empty, empty, np.empty(0, int))
