"""The 2 x 2 question: each enhancement alone, both together, and whether the whole is the sum.

Runs are paired: run i of all four cells shares its initial weights and its batches. With y = log
perplexity of a run,

    effects     y_u - y_0,  y_c - y_0,  y_uc - y_0          interaction     y_uc - y_u - y_c + y_0

each averaged over runs with Student's t interval. Negative is better: an interaction below 0 is
synergy. Effects are shown as relative change of perplexity, exp(y) - 1. A word is given only where
Holm's corrected p over the four contrasts is below .05.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from benchmarks.generator_study.presets import CELLS
from distil_rank.core.errors import InputError
from distil_rank.core.intervals import t_interval
from distil_rank.core.records import Metric, Record, interval

Array = NDArray[np.float64]


def over_runs(values: Sequence[float] | Array) -> Metric:
    """Mean of independent runs and its t interval; at least two."""
    if len(values) < 2:
        raise InputError(
            f"at least two runs per cell required for an interval, got {len(values)};"
            " use more --seeds"
        )
    return interval(float(np.mean(values)), *t_interval(values), False, runs=len(values))


def relative(values: Sequence[float] | Array) -> Metric:
    """Mean paired difference of log perplexity as a relative change of perplexity."""
    mean = over_runs(values)
    value, low, high = np.expm1([mean["value"], mean["low"], mean["high"]]).tolist()
    return interval(value, low, high, False, runs=len(values))


def contrasts(log_perplexity: Mapping[str, Sequence[float] | Array]) -> Record:
    """Effects and interaction from log perplexities of the four CELLS, one a run, in order."""
    y = {cell: np.asarray(log_perplexity[cell], dtype=float) for cell in CELLS}
    if len({len(v) for v in y.values()}) != 1:
        counts = [len(v) for v in y.values()]
        raise InputError(f"as many runs in every cell required, got {counts}; finish the runs")
    found: Record = {cell: relative(y[cell] - y["baseline"]) for cell in CELLS[1:]}
    crossed = y["both"] - y["uncertainty"] - y["calibration"] + y["baseline"]
    found["interaction"] = relative(crossed)
    corrected = holm([y[cell] - y["baseline"] for cell in CELLS[1:]] + [crossed])
    for name, p in zip((*CELLS[1:], "interaction"), corrected, strict=True):
        found[name]["corrected_p"] = p
    found["words"] = {cell: effect_word(found[cell]) for cell in CELLS[1:]}
    found["words"]["interaction"] = interaction_word(found["interaction"])
    found["words"]["published_claim"] = claim_word(found)
    return found


def holm(differences: Sequence[Array]) -> list[float]:
    """Corrected p of each mean paired difference being zero (t test, Holm)."""
    d = np.stack(differences)
    runs = d.shape[1]
    error = d.std(1, ddof=1).clip(np.finfo(float).tiny) / runs**0.5
    plain = 2 * t.sf(np.abs(d.mean(1)) / error, runs - 1)
    order = plain.argsort()  # statsmodels' function takes 57 ms, and simulations call this often
    steps = np.maximum.accumulate(plain[order] * np.arange(len(plain), 0, -1)).clip(max=1.0)
    return steps[order.argsort()].tolist()


def effect_word(effect: Mapping[str, Any], words: tuple[str, str] = ("helps", "hurts")) -> str:
    """A word only where the corrected p is below .05."""
    return "no effect found" if effect["corrected_p"] >= 0.05 else words[effect["value"] > 0]


def interaction_word(effect: Mapping[str, Any]) -> str:
    found = effect_word(effect, ("synergy", "antagonism"))
    return found.replace("effect", "interaction")


def claim_word(found: Mapping[str, Any]) -> str:
    """The claim: each alone hurts, both together help.

    Reproduced when all three intervals say so, contradicted when one says the opposite.
    """
    words = [effect_word(found[cell]) for cell in CELLS[1:]]
    if words == ["hurts", "hurts", "helps"]:
        return "reproduced"
    opposite = ["helps", "helps", "hurts"]
    against = any(a == b for a, b in zip(words, opposite))
    return "contradicted" if against else "not reproduced"


def detectable(deviation: float, runs: int, power: float = 0.8) -> float:
    """Smallest interaction, as a relative change, that `runs` find with at least this power.

    `deviation` is the standard deviation of the runs' interactions; the level is that of the first
    of four contrasts by Holm.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct

    critical = t.ppf(1 - 0.025 / len(CELLS), runs - 1)

    def missing(effect: float) -> float:
        shift = effect * runs**0.5
        return float(nct.sf(critical, runs - 1, shift)) - power

    return float(np.expm1(brentq(missing, 0.0, 100.0 / runs**0.5) * deviation))
