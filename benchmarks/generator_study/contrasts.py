"""Planned contrasts: paired effects over runs, Holm's correction over all of them, power.

Run i of every cell shares its batches, and its initial weights where they are random. With y = log
perplexity, a contrast is a sum of signed y; its effect is shown as relative change of perplexity,
exp(mean) - 1, with Student's t interval over runs. A word is given only where Holm's corrected p
over all contrasts of the study is below .05; elsewhere stands the smallest effect that would have
been found.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import nct, t

from benchmarks.generator_study.design import CLAIM, CONTRASTS
from distil_rank.core.errors import InputError
from distil_rank.core.intervals import t_interval
from distil_rank.core.records import Metric, Record, interval

Array = NDArray[np.float64]
Runs = Mapping[str, Mapping[str, Sequence[float]]]  # cell: proteins: log perplexity of each run


def over_runs(values: Sequence[float] | Array) -> Metric:
    """Mean of independent runs and its t interval; at least two."""
    if len(values) < 2:
        raise InputError(f"at least two runs a cell required, got {len(values)}; use more --seeds")
    return interval(float(np.mean(values)), *t_interval(values), False, runs=len(values))


def holm(differences: Sequence[Array]) -> list[float]:
    """Corrected p of each mean paired difference being zero (t test, Holm)."""
    d = np.stack(differences)
    runs = d.shape[1]
    error = d.std(1, ddof=1).clip(np.finfo(float).tiny) / runs**0.5
    plain = 2 * t.sf(np.abs(d.mean(1)) / error, runs - 1)
    order = plain.argsort()  # statsmodels' function takes 57 ms, and simulations call this often
    steps = np.maximum.accumulate(plain[order] * np.arange(len(plain), 0, -1)).clip(max=1.0)
    return steps[order.argsort()].tolist()


def detectable(deviation: float, runs: int, tests: int, power: float = 0.8) -> float:
    """Smallest relative change that is found with this power at Holm's first level, .05 / tests.

    `deviation` is that of the runs' differences of log perplexity.
    """
    from scipy.optimize import brentq

    critical = t.ppf(1 - 0.025 / tests, runs - 1)

    def missing(shift: float) -> float:
        return float(nct.sf(critical, runs - 1, shift)) - power

    return float(np.expm1(brentq(missing, 0.0, 10 * critical) / runs**0.5 * deviation))


def planned(sizes: Mapping[str, Runs]) -> Record:
    """Every contrast of every size, corrected together: {size: {contrast: effect}}."""
    found: dict[tuple[str, str], Array] = {}
    for size, y in sizes.items():
        counts = {len(runs) for by_proteins in y.values() for runs in by_proteins.values()}
        if len(counts) != 1:
            raise InputError(f"as many runs in every cell required, got {sorted(counts)} at {size}")
        for name, (weights, proteins, _) in CONTRASTS.items():
            parts = [weight * np.array(y[cell][proteins]) for cell, weight in weights.items()]
            found[size, name] = np.sum(parts, axis=0)
    record: Record = {size: {} for size in sizes}
    means = [over_runs(d) for d in found.values()]
    corrected = holm([*found.values()])
    for ((size, name), d), mean, p in zip(found.items(), means, corrected, strict=True):
        value, low, high = np.expm1([mean["value"], mean["low"], mean["high"]]).tolist()
        below, above = CONTRASTS[name][2]
        record[size][name] = interval(value, low, high, False, runs=len(d)) | {
            "corrected_p": p,
            "detectable": detectable(float(d.std(ddof=1)), len(d), len(found)),
            "word": "no effect found" if p >= 0.05 else below if value < 0 else above,
        }
    return record


def claims(effects: Mapping[str, Record]) -> Record:
    """The published claims at one size: alone they hurt, together they help; 15 to 25 % hard."""
    words = [effects[name]["word"] for name in ("uncertainty", "calibration", "both")]
    against = any(a == b for a, b in zip(words, ("helps", "helps", "hurts")))
    together = words == ["hurts", "hurts", "helps"]
    hard = effects["both, difficult third"]
    return {
        "each alone hurts, both together help": _word(together, against),
        "15 to 25 % on difficult proteins": _word(
            hard["word"] == "helps" and hard["low"] <= CLAIM[1] and hard["high"] >= CLAIM[0],
            hard["low"] > CLAIM[1],
        ),
    }


def _word(reproduced: bool, contradicted: bool) -> str:
    return "reproduced" if reproduced else "contradicted" if contradicted else "not reproduced"
