"""Planned contrasts on simulated studies whose truth is known."""

import numpy as np
import pytest

from benchmarks.generator_study.contrasts import claims, detectable, holm, planned
from benchmarks.generator_study.design import CONTRASTS, cells
from distil_rank.core.errors import InputError
from distil_rank.generators.loss import Objective

RUN, CELL = 0.02, 0.008  # deviations of log perplexity: shared by the cells of a run, and per cell


def simulated(rng, runs=5, **shifts):
    """A study of one size: log perplexity of every cell, shifted where asked."""
    shared = rng.normal(2.8, RUN, runs)
    return {
        name: {
            proteins: (shared + shifts.get(name, 0.0) + rng.normal(0, CELL, runs)).tolist()
            for proteins in ("all", "difficult")
        }
        for name in cells(Objective())
    }


def words(trials, seed, **shifts):
    """Words of every contrast, one list a trial."""
    rng = np.random.default_rng(seed)
    found = [planned({"tiny": simulated(rng, **shifts)})["tiny"] for _ in range(trials)]
    return {name: [of[name]["word"] for of in found] for name in CONTRASTS}, found


def test_a_study_without_effects_says_something_in_at_most_five_percent():
    """Holm's correction is over all contrasts of the study."""
    said, _ = words(300, 0)
    wrong = np.array([[word != "no effect found" for word in of] for of in said.values()])
    assert wrong.any(0).mean() <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)


def test_planted_effects_are_found_with_their_sign_and_covered():
    shift = np.log(0.9)
    said, found = words(100, 1, uncertainty=shift, both=2 * shift, slice=-shift)
    assert said["uncertainty"].count("helps") > 80 and said["both"].count("helps") > 80
    assert said["slice"].count("hurts") > 80 and "hurts" not in said["both"]
    covered = [of["uncertainty"]["low"] <= -0.1 <= of["uncertainty"]["high"] for of in found]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.06)


def test_the_detectable_effect_is_found_with_the_power_it_promises():
    runs, tests = 6, len(CONTRASTS)
    effect = np.log1p(detectable(CELL * 2**0.5, runs, tests))
    said, _ = words(400, 2, calibration=effect, runs=runs)
    assert said["calibration"].count("hurts") / 400 == pytest.approx(0.8, abs=0.06)
    assert detectable(CELL, 20, tests) < detectable(CELL, 5, tests) < detectable(CELL, 5, 24)


@pytest.mark.parametrize(
    "alone,both,low,high,expected",
    [
        ("hurts", "helps", -0.3, -0.1, ("reproduced", "reproduced")),
        ("helps", "helps", -0.05, 0.01, ("contradicted", "contradicted")),
        ("no effect found", "helps", -0.2, 0.3, ("not reproduced", "not reproduced")),
    ],
)
def test_claims_are_judged_by_corrected_words_and_intervals(alone, both, low, high, expected):
    hard = {"word": "helps" if high < 0 else "no effect found", "low": low, "high": high}
    effects = {"uncertainty": {"word": alone}, "calibration": {"word": alone}}
    found = claims(effects | {"both": {"word": both}, "both, difficult third": hard})
    assert tuple(found.values()) == expected


def test_holm_is_that_of_statsmodels():
    from scipy.stats import ttest_1samp
    from statsmodels.stats.multitest import multipletests

    differences = np.random.default_rng(4).normal(0.5, 1, (4, 6))
    wanted = multipletests(ttest_1samp(differences, 0, axis=1).pvalue, method="holm")[1]
    assert holm(list(differences)) == pytest.approx(wanted.tolist())


def test_one_run_has_no_interval_and_cells_have_equally_many():
    y = simulated(np.random.default_rng(0), runs=1)
    with pytest.raises(InputError, match="at least two runs"):
        planned({"tiny": y})
    y["both"]["all"].append(2.8)
    with pytest.raises(InputError, match="as many runs"):
        planned({"tiny": y})
