"""The 2 x 2 question: what each enhancement does alone, both together, and whether the whole differs from the sum.

Runs are paired: run i of all four cells shares its initial weights and its batches. With y = log perplexity of a run,

    effects     y_u - y_0,  y_c - y_0,  y_uc - y_0          interaction     y_uc - y_u - y_c + y_0

each averaged over runs with Student's t interval. Negative is better: an interaction below 0 is synergy. Effects are
shown as relative change of perplexity, exp(y) - 1. The words come from the intervals alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from distil_rank.core.errors import InputError
from distil_rank.generators.paper import CELLS
from distil_rank.core.records import interval

Array = NDArray[np.float64]


def t_interval(values: Sequence[float] | Array, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and t interval of independent values; at least two."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        raise InputError(f"at least two runs per cell required for an interval, got {len(array)}; use more seeds")
    half = float(t.ppf(0.5 + confidence / 2, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5)
    return float(array.mean()), float(array.mean()) - half, float(array.mean()) + half


def relative(values: Array) -> dict[str, Any]:
    """Mean paired difference of log perplexity as a relative change of perplexity, with interval."""
    value, low, high = (float(np.expm1(v)) for v in t_interval(values))
    return interval(value, low, high, higher_is_better=False, runs=len(values))


def contrasts(log_perplexity: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Effects and interaction from log perplexities of the four CELLS, one value per run, in the same order of runs."""
    y = {cell: np.asarray(log_perplexity[cell], dtype=float) for cell in CELLS}
    if len({len(v) for v in y.values()}) != 1:
        raise InputError(f"as many runs in every cell required, got {[len(v) for v in y.values()]}; finish the runs")
    found: dict[str, Any] = {cell: relative(y[cell] - y["baseline"]) for cell in CELLS[1:]}
    found["interaction"] = relative(y["both"] - y["uncertainty"] - y["calibration"] + y["baseline"])
    found["words"] = {cell: effect_word(found[cell]) for cell in CELLS[1:]}
    found["words"]["interaction"] = interaction_word(found["interaction"])
    found["words"]["published_claim"] = claim_word(found)
    return found


def effect_word(effect: Mapping[str, Any]) -> str:
    if effect["high"] < 0:
        return "helps"
    return "hurts" if effect["low"] > 0 else "no effect found"


def interaction_word(effect: Mapping[str, Any]) -> str:
    if effect["high"] < 0:
        return "synergy"
    return "antagonism" if effect["low"] > 0 else "no interaction found"


def claim_word(found: Mapping[str, Any]) -> str:
    """The claim: each alone hurts, both together help. Reproduced when all three intervals say so, contradicted when
    one says the opposite, otherwise not reproduced."""
    words = [effect_word(found[cell]) for cell in CELLS[1:]]
    if words == ["hurts", "hurts", "helps"]:
        return "reproduced"
    opposite = ["helps", "helps", "hurts"]
    return "contradicted" if any(a == b for a, b in zip(words, opposite, strict=True)) else "not reproduced"


def detectable(deviation: float, runs: int, power: float = 0.8) -> float:
    """Smallest interaction, as a relative change, that `runs` find with this power, given the runs' standard
    deviation."""
    from scipy.optimize import brentq
    from scipy.stats import nct

    critical = t.ppf(0.975, runs - 1)

    def missing(effect: float) -> float:
        shift = effect * runs**0.5
        return float(nct.sf(critical, runs - 1, shift)) - power

    return float(np.expm1(brentq(missing, 0.0, 100.0 / runs**0.5) * deviation))
