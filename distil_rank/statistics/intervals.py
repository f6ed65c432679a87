"""95 % intervals: bootstrap over rows, shared by everything compared; Student t over seeds."""

import numpy as np
import scipy.special
import torch
from torch import Tensor

LEVEL = 0.95


def bootstrap_counts(n: int, draws: int, generator: torch.Generator) -> Tensor:
    """How often each of n rows is drawn, with replacement, in each bootstrap draw (draws, n), float64.

    One such matrix for all rows of a table makes their comparison paired.
    """
    rows = torch.randint(n, (draws, n), generator=generator)
    return torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, rows, torch.ones(draws, n, dtype=torch.float64))


def percentile_interval(draws: Tensor | np.ndarray) -> tuple[float, float]:
    """Central 95 % of bootstrap draws."""
    low, high = np.quantile(np.asarray(draws, dtype=np.float64), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def t_interval(values: Tensor | np.ndarray | list[float]) -> tuple[float, float]:
    """Student t interval of the mean of independent values, for instance one a seed; one value gives no width."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, mean
    half = float(scipy.special.stdtrit(len(array) - 1, (1 + LEVEL) / 2) * array.std(ddof=1) / len(array) ** 0.5)
    return mean - half, mean + half


def weighted_quantile(values: Tensor, counts: Tensor, fraction: float) -> Tensor:
    """Lower quantile of values (n,) under each row of counts (draws, n) -> (draws,)."""
    order = values.argsort()
    reached = counts[:, order].cumsum(1) >= fraction * counts.sum(1, keepdim=True)
    return values[order][reached.to(torch.uint8).argmax(1)]
