"""95 % intervals, one function a kind: bootstrap, Student t, a share, a ratio over clusters."""

import numpy as np
import scipy.special
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import Metric, interval

LEVEL = 0.95
DRAWS = 1000
Array = NDArray[np.float64]


def bootstrap_counts(n: int, draws: int, generator: torch.Generator) -> Tensor:
    """How often each of n rows is drawn, with replacement, in each draw (draws, n), float64.

    One such matrix for all rows of a table makes their comparison paired.
    """
    rows = torch.randint(n, (draws, n), generator=generator)
    counts = torch.zeros(draws, n, dtype=torch.float64)
    return counts.scatter_add_(1, rows, torch.ones(draws, n, dtype=torch.float64))


def percentile_interval(draws: ArrayLike | Tensor) -> tuple[float, float]:
    """Central 95 % of bootstrap draws."""
    quantiles = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(np.asarray(draws, dtype=np.float64), quantiles)
    return float(low), float(high)


def mean_interval(values: ArrayLike, generator: torch.Generator, higher_is_better: bool) -> Metric:
    """Mean of independent values, for instance one an assay, with its bootstrap interval."""
    x = np.asarray(values, dtype=float)
    rows = torch.randint(len(x), (10 * DRAWS, len(x)), generator=generator).numpy()
    low, high = percentile_interval(x[rows].mean(1))
    return interval(float(x.mean()), low, high, higher_is_better, n=len(x))


def t_interval(values: ArrayLike | Tensor) -> tuple[float, float]:
    """Student t interval of the mean of independent values; one value gives no width."""
    array = np.asarray(values, dtype=np.float64)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return mean, mean
    half = _t(n - 1) * float(array.std(ddof=1)) / n**0.5
    return mean - half, mean + half


def share_interval(hits: float, n: int) -> Metric:
    """A proportion with Wilson's (1927) interval; half a hit is allowed."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(hits, n, method="wilson")
    return interval(hits / n, max(0.0, float(low)), min(1.0, float(high)), True, n=n)


def ratio_interval(
    values: Array, sizes: Array, cluster: NDArray[np.int64]
) -> tuple[float, float, float]:
    """sum(values) / sum(sizes) and its interval where clusters (proteins) are independent."""
    _, label = np.unique(cluster, return_inverse=True)
    numerator, denominator = np.bincount(label, values), np.bincount(label, sizes)
    ratio, n = float(numerator.sum() / denominator.sum()), len(numerator)
    if n < 2:
        raise InputError("at least two proteins required for an interval, got one; give more")
    residual = numerator - ratio * denominator
    error = float(np.sqrt((residual**2).sum() * n / (n - 1)) / denominator.sum())
    half = _t(n - 1) * error
    return ratio, ratio - half, ratio + half


def _t(degrees: int) -> float:
    return float(scipy.special.stdtrit(degrees, (1 + LEVEL) / 2))


def weighted_quantile(values: Tensor, counts: Tensor, fraction: float) -> Tensor:
    """Lower quantile of values (n,) under each row of counts (draws, n) -> (draws,)."""
    order = values.argsort()
    reached = counts[:, order].cumsum(1) >= fraction * counts.sum(1, keepdim=True)
    return values[order][reached.to(torch.uint8).argmax(1)]
