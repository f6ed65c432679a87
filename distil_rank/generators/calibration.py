"""Is a model's confidence its accuracy? ECE with sign, noise floor, debiased value and interval.

A perfectly calibrated model has an expected calibration error above 0, because each bin's accuracy
is a sample: .08 at 100 tokens, .006 at 20,000 (10 bins). So the plain value is never shown alone:

    gap_b    = mean confidence - accuracy in bin b (positive: overconfident), standard error s_b
    ECE      = sum_b n_b / N |gap_b|                   signed gap = sum_b n_b / N gap_b
    floor    = mean ECE were the model calibrated: sum_b n_b / N s_b sqrt(2 / pi)
    debiased = ECE - sum_b n_b / N (E |N(g_b, s_b)| - |g_b|),  g_b = gap_b if beyond 3 s_b, else 0

Under calibration debiased = ECE - floor, which is 0 on average. s_b^2 = sum c (1 - c) / n_b^2 over
the confidences in the bin: the errors of a calibrated autoregressive model are martingale
differences, so tokens of one protein need no correction there. The signed gap makes no such
assumption and takes its interval over proteins.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from distil_rank.core.errors import InputError
from distil_rank.core.intervals import percentile_interval, ratio_interval
from distil_rank.core.records import Record, interval

BINS = 10
SIGNIFICANT = 3.0  # standard errors beyond which a bin's gap is taken as real
DRAWS = 4000  # of the interval
Array = NDArray[np.float64]


def calibration(
    confidence: Array,
    correct: Array,
    brier: Array,
    protein: NDArray[np.int64],
    seed: int = 0,
) -> Record:
    """Calibration of the most probable token.

    Of each token (n,): confidence, correct (0 or 1), Brier score and protein.
    """
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    if not len(confidence):
        raise InputError("at least one token required for calibration, got none; give proteins")
    table = reliability(confidence, correct)
    share, gap, error = table["share"], table["gap"], table["standard_error"]
    ece = float((share * np.abs(gap)).sum())
    kept = np.where(np.abs(gap) > SIGNIFICANT * error, gap, 0.0)
    debiased = ece - float((share * (folded_mean(kept, error) - np.abs(kept))).sum())
    draws = np.random.default_rng([seed, 9]).normal(kept, error, size=(DRAWS, len(kept)))
    deviation = (share * np.abs(draws)).sum(1) - (share * folded_mean(kept, error)).sum()
    low, high = percentile_interval(deviation)
    used = error > 0
    ones = np.ones_like(confidence)
    signed = ratio_interval(confidence - correct, ones, protein)
    return {
        "tokens": len(confidence),
        "ece": ece,
        "noise_floor": float((share * error).sum() * np.sqrt(2 / np.pi)),
        "ece_debiased": interval(debiased, debiased - high, debiased - low, False),
        "signed_gap": interval(*signed, False, target=0.0),
        "mce": float(np.abs(gap).max()),
        "mce_in_standard_errors": float(np.abs(gap[used] / error[used]).max(initial=0.0)),
        "brier": interval(*ratio_interval(np.asarray(brier, float), ones, protein), False),
        "accuracy": float(correct.mean()),
        "mean_confidence": float(confidence.mean()),
        "bins": {name: [float(v) for v in values] for name, values in table.items()},
    }


def reliability(confidence: Array, correct: Array) -> dict[str, Array]:
    """Bins of equal width that hold tokens: share, confidence, accuracy, gap, standard error."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    used = count > 0
    n = count[used].astype(float)

    def total(values: Array) -> Array:
        return np.asarray(np.bincount(place, values, minlength=BINS)[used], dtype=float)

    mean, accuracy = total(confidence) / n, total(correct) / n
    error = np.sqrt(total(confidence * (1 - confidence)).clip(0)) / n
    return {
        "count": n,
        "share": n / n.sum(),
        "confidence": mean,
        "accuracy": accuracy,
        "gap": mean - accuracy,
        "standard_error": error,
    }


def folded_mean(mean: Array, deviation: Array) -> Array:
    """E |N(mean, deviation)|, elementwise."""
    safe = np.where(deviation > 0, deviation, 1.0)
    z = mean / safe
    found = deviation * np.sqrt(2 / np.pi) * np.exp(-(z**2) / 2) + mean * (1 - 2 * norm.cdf(-z))
    return np.where(deviation > 0, found, np.abs(mean))


def best_temperature(grid: Array, nll: Array) -> float:
    """Temperature of least NLL from values on a grid.

    The vertex of a parabola in log temperature through the best point and its neighbors.
    """
    at = int(np.clip(np.argmin(nll), 1, len(grid) - 2))
    x, y = np.log(grid[at - 1 : at + 2]), nll[at - 1 : at + 2]
    a, b, _ = np.polyfit(x, y, 2)
    if a <= 0:
        return float(grid[int(np.argmin(nll))])
    return float(np.exp(np.clip(-b / (2 * a), x[0], x[-1])))
