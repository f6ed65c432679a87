"""Is a model's confidence its accuracy? Calibration error and an interval that holds.

    gap_b     = mean confidence - accuracy in bin b of equal mass (positive: overconfident)
    plain     = sum_b n_b / N gap_b^2, above 0 also for a calibrated model: accuracies are samples
    unbiased  = plain - sum_b n_b / N Var(gap_b)                 Kumar, Liang and Ma (2019)
    error     = sqrt(max(0, unbiased))                           root mean square gap

Var and the interval come from a bootstrap over proteins (Rubin's weights), so tokens of one protein
may hang together. A percentile interval would not hold: the bootstrap's own gaps are larger than
those observed. So tests are inverted: theta is in the interval where |error - theta| is no rarer
than 5 % among errors of gaps theta u + e, with u the observed gaps' direction and e a bootstrap
deviation.
"""

import numpy as np
from numpy.typing import NDArray

from distil_rank.core.intervals import LEVEL, ratio_interval
from distil_rank.core.records import Metric, Record, interval

BINS = 10
DRAWS, AT_ONCE = 1000, 100  # of the bootstrap
GRID = 200  # values of theta that are tested
Array = NDArray[np.float64]


def calibration(
    confidence: Array, correct: Array, protein: NDArray[np.int64], seed: int = 0
) -> Record:
    """Calibration of the most probable token: confidence, correct (0 or 1) and protein (n,)."""
    place = bins_of(confidence)
    count = np.bincount(place).astype(float)
    gap = np.bincount(place, confidence - correct) / count
    deviation = deviations(confidence - correct, place, protein, seed)
    signed = ratio_interval(confidence - correct, np.ones_like(confidence), protein)
    return {
        "tokens": len(confidence),
        "error": calibration_error(gap, count / count.sum(), deviation),
        "signed_gap": interval(*signed, False, target=0.0),
    }


def bins_of(confidence: Array) -> NDArray[np.int64]:
    """Bin (n,) of each token, with as many tokens in each as ties allow, numbered from 0."""
    edges = np.quantile(confidence, np.arange(1, BINS) / BINS)
    return np.unique(np.searchsorted(edges, confidence), return_inverse=True)[1]


def deviations(
    gap: Array, place: NDArray[np.int64], protein: NDArray[np.int64], seed: int
) -> Array:
    """Gap of each bin under bootstrap weights of the proteins, less the observed one (draws, b)."""
    proteins, label = np.unique(protein, return_inverse=True)
    shape = (len(proteins), int(place.max()) + 1)
    cell = label * shape[1] + place
    total = np.bincount(cell, gap, shape[0] * shape[1]).reshape(shape)
    count = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).astype(float)
    rng, found = np.random.default_rng([seed, 9]), []
    for _ in range(DRAWS // AT_ONCE):
        weight = rng.standard_exponential((AT_ONCE, shape[0]))
        found.append((weight @ total) / (weight @ count))
    return np.concatenate(found) - total.sum(0) / count.sum(0)


def calibration_error(gap: Array, share: Array, deviation: Array) -> Metric:
    """The error of the module's text and its interval, from gaps and shares (b,)."""
    noise = (deviation**2) @ share
    variance = float(noise.mean())
    plain = float(gap**2 @ share)
    value = max(0.0, plain - variance) ** 0.5
    direction = gap / plain**0.5 if plain > 0 else np.ones_like(gap)
    along = deviation @ (share * direction)
    theta = np.linspace(0, value + 6 * variance**0.5, GRID)[:, None]
    drawn = np.sqrt((theta**2 + 2 * theta * along + noise - variance).clip(0))
    within = np.abs(value - theta[:, 0]) <= np.quantile(np.abs(drawn - theta), LEVEL, axis=1)
    kept = np.append(theta[within, 0], value)
    return interval(value, float(kept.min()), float(kept.max()), False, target=0.0)
