"""How much of a function a student keeps, in the terms of what its outputs are for."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.intervals import DRAWS, bootstrap_counts, percentile_interval
from distil_rank.core.randomness import generator
from distil_rank.core.records import Metric, interval

NEIGHBORS = 10
CLASSES = 20  # outputs up to which they are classes; more are a vector
NAMES = {"spearman": "Spearman", "top1": "top-1", "neighbors": f"{NEIGHBORS} nearest neighbors"}


def measure_for(outputs: int, vector: bool = False) -> str:
    """The measure that fits: spearman for one output, top1 for classes, neighbors for a vector."""
    if vector or outputs > CLASSES:
        return "neighbors"
    return "spearman" if outputs == 1 else "top1"


def nearest(y: Tensor) -> Tensor:
    """Indices (n, NEIGHBORS) of the nearest other rows of y (n, d), Euclidean."""
    found = []
    y = y.double()
    for start in range(0, len(y), 1024):
        distance = torch.cdist(y[start : start + 1024], y)
        distance[torch.arange(len(distance)), torch.arange(start, start + len(distance))] = np.inf
        found.append(distance.topk(NEIGHBORS, 1, largest=False).indices)
    return torch.cat(found)


def neighbors_kept(y: Tensor, other: Tensor) -> Tensor:
    """Share of the nearest rows of y (n, d) that are nearest rows of `other` too (n,)."""
    a, b = nearest(y), nearest(other)
    return (a[:, :, None] == b[:, None, :]).any(2).double().mean(1)


def function_kept(y: Tensor, other: Tensor, measure: str, seed: int = 0) -> Metric:
    """What `other` (n, d) keeps of y (n, d), with its bootstrap interval over rows; 1 is all."""
    y, other = y.detach().cpu(), other.detach().cpu()
    if len(y) <= NEIGHBORS:
        raise InputError(f"more than {NEIGHBORS} rows required to compare outputs, got {len(y)}")
    source = generator(seed, "bootstrap over rows")
    if measure == "spearman":
        pair = np.stack([t[:, 0].double().numpy() for t in (y, other)])
        rows = torch.randint(len(y), (DRAWS, len(y)), generator=source).numpy()
        draws, value = _correlation(pair[:, rows]), float(_correlation(pair[:, None])[0])
        if not np.isfinite(value):
            raise InputError("outputs of more than one value required for Spearman, got one")
        return interval(value, *percentile_interval(draws[np.isfinite(draws)]), True, n=len(y))
    kept = neighbors_kept(y, other) if measure == "neighbors" else y.argmax(1) == other.argmax(1)
    kept = kept.double()
    means = bootstrap_counts(len(kept), DRAWS, source) @ kept / len(kept)
    return interval(float(kept.mean()), *percentile_interval(means), True, n=len(y))


def _correlation(pair: np.ndarray) -> np.ndarray:
    """Spearman of pair[0] and pair[1], each (draws, n) -> (draws,); NaN where one is constant."""
    a, b = rankdata(pair, axis=-1)
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1)))
