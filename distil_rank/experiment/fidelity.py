"""How faithful a student is on held-out rows, with intervals, and what no student can beat."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.core.intervals import percentile_interval, t_interval, weighted_quantile
from distil_rank.core.lowrank import Optimum, fractions, tails
from distil_rank.core.records import Metric, Record, interval

WORST = 0.01  # the worst-1 % cosine is this quantile over rows: 99 % of proteins are above it
ROWS, BLOCK = 8192, 256  # of which predictions and errors are made at a time
HIGHER_IS_BETTER = {
    "fvu": False,
    "relative_mse": False,
    "cosine": True,
    "centred_cosine": True,
    "worst_1pct_cosine": True,
}


@dataclass(frozen=True)
class RowErrors:
    """What every metric needs of each row (n,), float64."""

    error: Tensor  # |y' - y|^2
    energy: Tensor  # |y|^2
    variance: Tensor  # |y - mean y|^2
    cosine: Tensor
    centred_cosine: Tensor  # of y - mean y and y' - mean y, 0 where the student outputs that mean

    @property
    def fvu(self) -> float:
        return float(self.error.sum() / self.variance.sum())


def fvu(outputs: Tensor, student: nn.Module, x: Tensor) -> float:
    """FVU alone, of a student on rows x (n, d_in) for outputs (n, d_out), in the outputs' dtype.

    The student runs in its own dtype on so many rows at a time that memory stays bounded.
    """
    dtype = next(student.parameters()).dtype
    parts = [student(rows.to(dtype)).to(outputs) for rows in x.split(ROWS)]
    mse = nn.functional.mse_loss(torch.cat(parts) if len(parts) > 1 else parts[0], outputs)
    return float(mse / outputs.var(0, correction=0).mean())


def row_errors(outputs: Tensor, prediction: Tensor) -> RowErrors:
    """Compare predictions with the teacher's outputs (n, d_out), whose mean is the mean."""
    mean, parts = outputs.double().mean(0), []
    for y, p in zip(outputs.split(BLOCK), prediction.split(BLOCK)):
        y, p = y.double(), p.double()
        errors = ((p - y).square(), y.square(), (y - mean).square())
        cosines = (torch.cosine_similarity(a, b, dim=1) for a, b in ((y, p), (y - mean, p - mean)))
        parts.append((*(e.sum(1) for e in errors), *cosines))
    return RowErrors(*map(torch.cat, zip(*parts)))


def metric_draws(rows: RowErrors, counts: Tensor) -> dict[str, Tensor]:
    """Each metric under each row of counts (draws, n) -> (draws,); one row of ones: its value."""
    columns = [rows.error, rows.energy, rows.variance, rows.cosine, rows.centred_cosine]
    error, energy, variance, cosine, centred = (counts @ torch.stack(columns, 1)).T
    n = counts.sum(1)
    return {
        "fvu": error / variance,
        "relative_mse": error / energy,
        "cosine": cosine / n,
        "centred_cosine": centred / n,
        "worst_1pct_cosine": weighted_quantile(rows.cosine, counts, WORST),
    }


def summarize(
    seeds: list[RowErrors], counts: Tensor, reference: list[RowErrors] | None = None
) -> dict[str, Any]:
    """Metrics of one student over its seeds: mean, interval over rows and over seeds, each seed.

    With a reference student, also the paired difference in FVU: same rows, seeds and draws, and
    its interval over rows and seeds together.
    """
    ones = counts.new_ones(1, counts.shape[1])
    values, draws = _drawn(seeds, ones), _drawn(seeds, counts)
    summary: dict[str, Any] = {
        name: _metric(values[name], draws[name], better)
        for name, better in HIGHER_IS_BETTER.items()
    }
    if reference is not None:
        by_seed = values["fvu"] - _drawn(reference, ones)["fvu"]
        paired = draws["fvu"] - _drawn(reference, counts)["fvu"]
        summary["fvu_minus_optimum"] = _over_rows_and_seeds(_metric(by_seed, paired, False))
    return summary


def without_intervals(summary: dict[str, Any]) -> dict[str, Any]:
    """The floor's metrics: drawn again, rows repeat and its FVU falls, so draws say nothing."""
    kept = ("value", "higher_is_better", "per_seed")
    return {name: {key: metric[key] for key in kept} for name, metric in summary.items()}


def _over_rows_and_seeds(metric: Metric) -> Record:
    """Adds the interval whose half widths are those over rows and over seeds in quadrature."""
    value, seeds = metric["value"], metric["seeds_interval"]
    low = value - math.hypot(value - metric["low"], value - seeds[0])
    return {
        **metric,
        "rows_and_seeds": [low, value + math.hypot(metric["high"] - value, seeds[1] - value)],
    }


def _drawn(seeds: list[RowErrors], counts: Tensor) -> dict[str, Tensor]:
    """Metrics of one student under each row of counts (seeds, draws)."""
    found = [metric_draws(rows, counts) for rows in seeds]
    return {name: torch.stack([f[name] for f in found]).cpu() for name in HIGHER_IS_BETTER}


def _metric(per_seed: Tensor, draws: Tensor, higher_is_better: bool) -> Metric:
    """From the value of each seed (seeds, 1) and the draws (seeds, draws)."""
    low, high = percentile_interval(draws.mean(0))
    values = per_seed[:, 0].tolist()
    more = {"seeds_interval": t_interval(values), "per_seed": values}
    return interval(float(per_seed.mean()), low, high, higher_is_better, **more)


def rank_curves(solution: Optimum, outputs: Tensor) -> dict[str, Tensor]:
    """FVU of rank 0 ... k: of the optimum on its own and on held-out outputs, and the floor there.

    And the optimum's mean cosine on the held-out outputs (n, d_out). With y - m = sum_i z_i u_i (m
    the fitted output mean), the rank-r student outputs m + sum_{i<=r} z_i u_i, so all ranks are
    cumulated sums over the columns of z = (y - m) U.
    """
    m = solution.output_mean
    y = outputs.to(m)
    z = (y - m) @ solution.basis
    u = solution.basis.T @ m
    error = (y - m).square().sum() - _cumulated(z.square().sum(0, keepdim=True))[0]
    inner = (y @ m)[:, None] + _cumulated(z * (z + u))
    length = m.square().sum() + _cumulated(z * (z + 2 * u))
    norms = (y.square().sum(1, keepdim=True) * length).clamp_min(1e-32).sqrt()
    return {
        "train_fvu": solution.fvu,
        "fvu": error.clamp_min(0) / (y - y.mean(0)).square().sum(),
        "floor_fvu": floor_curve(outputs),
        "cosine": (inner / norms).mean(0),
    }


def floor_curve(outputs: Tensor) -> Tensor:
    """FVU that no student of rank 0 ... d_out can beat on these outputs (n, d_out); (d_out + 1,)"""
    y = outputs.double()
    curve = fractions(tails(gram_eigenvalues(y - y.mean(0)).clamp_min(0)))
    return torch.cat([curve, curve.new_zeros(max(0, y.shape[1] + 1 - len(curve)))])


def cosine_bound(outputs: Tensor, rank: int) -> float:
    """No affine student of rank r has a mean cosine above this on these rows (n, d_out).

    It is sqrt(sum_{i<=r+1} lambda_i(E y y^T / |y|^2)): outputs lie in r directions and the bias;
    cos(y, y') is at most the length of y / |y| within that subspace, and by Jensen the mean length
    is at most the root of the mean square.
    """
    y = torch.nn.functional.normalize(outputs.double(), dim=1)
    return float((gram_eigenvalues(y)[: rank + 1].sum() / len(y)).clamp(0, 1).sqrt())


def gram_eigenvalues(y: Tensor) -> Tensor:
    """Eigenvalues of y^T y for rows y (n, d), the min(n, d) largest, descending."""
    gram = y @ y.T if len(y) < y.shape[1] else y.T @ y
    return torch.linalg.eigvalsh(gram).flip(0)


def _cumulated(columns: Tensor) -> Tensor:
    """Cumulated sums over columns (n, k), starting at 0: (n, k + 1)."""
    return torch.cat([columns.new_zeros(len(columns), 1), columns.cumsum(1)], 1)
