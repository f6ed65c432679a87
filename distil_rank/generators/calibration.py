"""Is a model's confidence its accuracy? ECE with a sign, a noise floor, a debiased value and an interval.

A perfectly calibrated model has an expected calibration error above 0, because each bin's accuracy is a sample: .08
at 100 tokens, .006 at 20,000 (10 bins). So the plain value is never shown alone:

    gap_b    = mean confidence - accuracy in bin b (positive: overconfident), of standard error s_b
    ECE      = sum_b n_b / N |gap_b|                   signed gap = sum_b n_b / N gap_b
    floor    = what ECE would be on average were the model calibrated: sum_b n_b / N s_b sqrt(2 / pi)
    debiased = ECE - sum_b n_b / N (E |N(g_b, s_b)| - |g_b|),  g_b = gap_b where it is beyond 3 s_b, else 0

Under calibration debiased = ECE - floor, which is 0 on average. s_b^2 = sum c (1 - c) / n_b^2 over the confidences in
the bin: the errors of a calibrated autoregressive model are martingale differences, so tokens of one protein need no
correction there. The signed gap makes no such assumption and takes its interval over proteins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from distil_rank.core.errors import InputError
from distil_rank.core.records import interval

BINS = 10
SIGNIFICANT = 3.0  # standard errors beyond which a bin's gap is taken as real
DRAWS = 4000  # of the interval
Array = NDArray[np.float64]


def calibration(
    confidence: Array, correct: Array, brier: Array, protein: NDArray[np.int64], seed: int = 0, bins: int = BINS
) -> dict[str, Any]:
    """Calibration of the most probable token: confidence, correct (0 or 1), Brier score and protein of each token
    (n,)."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    if not len(confidence):
        raise InputError("at least one token required for calibration, got none; give proteins")
    table = reliability(confidence, correct, bins)
    share, gap, error = table["share"], table["gap"], table["standard_error"]
    ece = float((share * np.abs(gap)).sum())
    kept = np.where(np.abs(gap) > SIGNIFICANT * error, gap, 0.0)
    debiased = ece - float((share * (folded_mean(kept, error) - np.abs(kept))).sum())
    draws = np.random.default_rng([seed, 9]).normal(kept, error, size=(DRAWS, len(kept)))
    deviation = (share * np.abs(draws)).sum(1) - (share * folded_mean(kept, error)).sum()
    low, high = np.quantile(deviation, [0.025, 0.975])
    used = error > 0
    ones = np.ones_like(confidence)
    return {
        "tokens": len(confidence),
        "ece": ece,
        "noise_floor": float((share * error).sum() * np.sqrt(2 / np.pi)),
        "ece_debiased": interval(debiased, debiased - float(high), debiased - float(low), False),
        "signed_gap": ratio_interval(confidence - correct, ones, protein, target=0.0),
        "mce": float(np.abs(gap).max()),
        "mce_in_standard_errors": float(np.abs(gap[used] / error[used]).max()) if used.any() else 0.0,
        "brier": ratio_interval(np.asarray(brier, float), ones, protein),
        "accuracy": float(correct.mean()),
        "mean_confidence": float(confidence.mean()),
        "bins": {name: [float(v) for v in values] for name, values in table.items()},
    }


def reliability(confidence: Array, correct: Array, bins: int = BINS) -> dict[str, Array]:
    """Bins of equal width that hold tokens: their share, mean confidence, accuracy, gap and its standard error."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    used = count > 0
    n = count[used].astype(float)

    def total(values: Array) -> Array:
        return np.asarray(np.bincount(place, values, minlength=bins)[used], dtype=float)

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


def ratio_of_sums(values: Array, sizes: Array, cluster: NDArray[np.int64]) -> tuple[float, float, float]:
    """sum(values) / sum(sizes) with its 95 % interval when clusters (proteins), not entries, are independent."""
    _, label = np.unique(cluster, return_inverse=True)
    numerator, denominator = np.bincount(label, values), np.bincount(label, sizes)
    ratio, n = float(numerator.sum() / denominator.sum()), len(numerator)
    if n < 2:
        raise InputError("at least two proteins required for an interval, got one; give more")
    residual = numerator - ratio * denominator
    error = np.sqrt((residual**2).sum() * n / (n - 1)) / denominator.sum()
    half = float(t.ppf(0.975, n - 1) * error)
    return ratio, ratio - half, ratio + half


def ratio_interval(values: Array, sizes: Array, cluster: NDArray[np.int64], **more: Any) -> dict[str, Any]:
    """`ratio_of_sums` as records hold it, for a loss."""
    return interval(*ratio_of_sums(values, sizes, cluster), higher_is_better=False, **more)


def best_temperature(grid: Array, nll: Array) -> float:
    """Temperature of least NLL from values on a grid: a parabola in log temperature through the best point and its
    neighbours."""
    at = int(np.clip(np.argmin(nll), 1, len(grid) - 2))
    x, y = np.log(grid[at - 1 : at + 2]), nll[at - 1 : at + 2]
    a, b, _ = np.polyfit(x, y, 2)
    return float(np.exp(np.clip(-b / (2 * a), x[0], x[-1]))) if a > 0 else float(grid[int(np.argmin(nll))])
