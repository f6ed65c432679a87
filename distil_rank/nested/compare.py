"""Paired comparison of representations over assays: Spearman, means with intervals, win rates, Wilcoxon with Holm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from distil_rank.core.randomness import generator
from distil_rank.core.records import interval

DRAWS = 10_000  # bootstrap resamples of the assays


def spearman(prediction: Sequence[float] | np.ndarray, score: Sequence[float] | np.ndarray) -> float:
    """Spearman correlation; 0 where a constant prediction ranks nothing."""
    if np.ptp(prediction) == 0 or np.ptp(score) == 0:
        return 0.0
    return float(stats.spearmanr(prediction, score).statistic)


def mean_interval(values: Sequence[float] | np.ndarray, seed: int, higher_is_better: bool = True) -> dict[str, Any]:
    """Mean over assays with its 95 % bootstrap interval (assays resampled)."""
    x = np.asarray(values, dtype=float)
    draws = torch.randint(len(x), (DRAWS, len(x)), generator=generator(seed, "bootstrap", len(x))).numpy()
    low, high = np.quantile(x[draws].mean(1), [0.025, 0.975])
    return interval(float(x.mean()), float(low), float(high), higher_is_better, n=len(x))


def win_rate(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Share of assays where ours is higher, ties half, with Wilson's 95 % interval."""
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    wins = float((a > b).sum() + 0.5 * (a == b).sum())
    low, high = wilson(wins, len(a))
    return interval(wins / len(a), low, high, True, n=len(a))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's (1927) 95 % interval of a proportion."""
    z = float(stats.norm.ppf(0.975))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def wilcoxon(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> float:
    """Two-sided p value of Wilcoxon's signed-rank test on paired assays; 1 where all are tied."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    return 1.0 if not difference.any() else float(stats.wilcoxon(difference).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate([p_values[i] * (len(p_values) - rank) for rank, i in enumerate(order)])
    adjusted = [0.0] * len(p_values)
    for rank, i in enumerate(order):
        adjusted[i] = min(1.0, float(stepped[rank]))
    return adjusted


def compare(scores: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]], seed: int) -> list[dict[str, Any]]:
    """One row per pair (ours, theirs): mean difference, win rate, Wilcoxon p raw and Holm-corrected over the pairs.

    `scores[name]` holds one value per assay, in one order of assays.
    """
    raw = [wilcoxon(scores[a], scores[b]) for a, b in pairs]
    rows = []
    for (a, b), p, adjusted in zip(pairs, raw, holm(raw)):
        difference = np.asarray(scores[a], dtype=float) - np.asarray(scores[b], dtype=float)
        rows.append(
            {
                "ours": a,
                "theirs": b,
                "difference": mean_interval(difference, seed),
                "win_rate": win_rate(scores[a], scores[b]),
                "wilcoxon_p": p,
                "holm_p": adjusted,
            }
        )
    return rows


def monotonicity(chain: Sequence[Sequence[float]], seed: int) -> dict[str, Any]:
    """How often more dimensions mean more: `chain[i]` holds the scores per assay at the i-th size, smallest first.

    `monotone`: share of assays whose score never falls along the chain; `steps`: mean gain of every step.
    """
    x = np.asarray(chain, dtype=float)
    rising = np.asarray((np.diff(x, axis=0) >= 0).all(0))
    low, high = wilson(float(rising.sum()), len(rising))
    return {
        "monotone": interval(float(rising.mean()), low, high, True, n=len(rising)),
        "steps": [mean_interval(step, seed) for step in np.diff(x, axis=0)],
    }
