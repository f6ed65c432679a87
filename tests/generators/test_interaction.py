"""Interaction statistics on simulated ablations whose truth is known."""

import numpy as np
import pytest

from benchmarks.generator_study.interaction import contrasts, detectable, holm, over_runs
from benchmarks.generator_study.presets import CELLS
from distil_rank.core.errors import InputError

RUN, CELL = (
    0.02,
    0.008,
)  # standard deviations of log perplexity: shared by the four cells of a run, and per cell


def simulated(rng, runs=5, uncertainty=0.01, calibration=0.02, interaction=0.0):
    shared = rng.normal(2.8, RUN, runs)
    planted = {
        "baseline": 0.0,
        "uncertainty": uncertainty,
        "calibration": calibration,
        "both": uncertainty + calibration + interaction,
    }
    return {cell: shared + planted[cell] + rng.normal(0, CELL, runs) for cell in CELLS}


def test_additive_effects_are_rarely_called_synergy():
    rng = np.random.default_rng(0)
    words = [contrasts(simulated(rng))["words"]["interaction"] for _ in range(200)]
    assert words.count("synergy") <= 0.05 * 200 and words.count("antagonism") <= 0.06 * 200


def test_an_interaction_of_minus_five_percent_is_found():
    rng = np.random.default_rng(1)
    words = [
        contrasts(simulated(rng, interaction=np.log(0.95)))["words"]["interaction"]
        for _ in range(200)
    ]
    assert words.count("synergy") >= 0.8 * 200


def test_detectable_effect_is_found_with_the_power_it_promises():
    deviation = CELL * 2  # of a contrast of four independent cells
    effect = np.log1p(detectable(deviation, 5))
    rng = np.random.default_rng(2)
    found = [
        contrasts(simulated(rng, interaction=-effect))["words"]["interaction"] for _ in range(600)
    ]
    assert found.count("synergy") / 600 >= 0.77
    assert detectable(deviation, 20) < detectable(deviation, 5)


def test_intervals_of_the_effects_cover_them():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        found = contrasts(simulated(rng))["calibration"]
        hits += found["low"] <= np.expm1(0.02) <= found["high"]
    assert hits / 400 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    "planted,word",
    [
        ((0.3, 0.3, -0.9), "reproduced"),
        ((-0.3, 0.3, 0.0), "contradicted"),
        ((0.3, 0.3, 0.0), "contradicted"),
        ((0.3, 0.0, -0.6), "not reproduced"),
    ],
)
def test_the_published_claim_is_judged_by_all_three_effects(planted, word):
    # a calibration effect of exactly nothing: symmetric noise
    noise = np.array([-0.01, 0.01, -0.005, 0.005, 0.0])
    u, c, i = planted
    y = {
        "baseline": 0 * noise,
        "uncertainty": u + noise,
        "calibration": c + noise[::-1],
        "both": u + c + i + noise,
    }
    assert contrasts(y)["words"]["published_claim"] == word


def test_holm_is_that_of_statsmodels():
    from scipy.stats import ttest_1samp
    from statsmodels.stats.multitest import multipletests

    differences = np.random.default_rng(4).normal(0.5, 1, (4, 6))
    wanted = multipletests(ttest_1samp(differences, 0, axis=1).pvalue, method="holm")[1]
    assert holm(list(differences)) == pytest.approx(wanted.tolist())


def test_one_run_has_no_interval():
    with pytest.raises(InputError, match="at least two runs"):
        over_runs([1.0])
    with pytest.raises(InputError, match="as many runs"):
        contrasts({"baseline": [1, 2], "uncertainty": [1, 2], "calibration": [1, 2], "both": [1]})
