"""How faithful a student is on held-out rows, with intervals; every cosine stands beside the constant's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distil_rank.core.records import interval
from distil_rank.core.intervals import percentile_interval, t_interval, weighted_quantile

WORST = 0.01  # the worst-1 % cosine is this quantile over rows: 99 % of proteins are above it
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


def fvu(outputs: Tensor, prediction: Tensor) -> float:
    """FVU alone, of outputs and predictions (n, d_out) compared in the outputs' dtype: cheap on many rows."""
    mse = torch.nn.functional.mse_loss(prediction.to(outputs), outputs)
    return float(mse / outputs.var(0, correction=0).mean())


def row_errors(outputs: Tensor, prediction: Tensor) -> RowErrors:
    """Compare predictions with the teacher's outputs, both (n, d_out); the mean is that of the outputs."""
    y, p = outputs.double(), prediction.double()
    mean = y.mean(0)
    return RowErrors(
        error=(p - y).square().sum(1),
        energy=y.square().sum(1),
        variance=(y - mean).square().sum(1),
        cosine=torch.cosine_similarity(y, p, dim=1),
        centred_cosine=torch.cosine_similarity(y - mean, p - mean, dim=1),
    )


def metric_draws(rows: RowErrors, counts: Tensor) -> dict[str, Tensor]:
    """Each metric under each row of counts (draws, n) -> (draws,); a single row of ones gives the value itself."""
    error, energy, variance, cosine, centred = (
        counts @ torch.stack([rows.error, rows.energy, rows.variance, rows.cosine, rows.centred_cosine], 1)
    ).T
    n = counts.sum(1)
    return {
        "fvu": error / variance,
        "relative_mse": error / energy,
        "cosine": cosine / n,
        "centred_cosine": centred / n,
        "worst_1pct_cosine": weighted_quantile(rows.cosine, counts, WORST),
    }


def summarise(
    seeds: list[RowErrors], counts: Tensor, reference: list[RowErrors] | None = None
) -> dict[str, dict[str, object]]:
    """Metrics of one student over its seeds: mean, interval over rows and over seeds, value per seed.

    With a reference student, also the paired difference to it: same rows, same seeds, same bootstrap draws.
    """
    values, draws = _values_and_draws(seeds, counts)
    summary: dict[str, dict[str, object]] = {}
    for name, better in HIGHER_IS_BETTER.items():
        low, high = percentile_interval(draws[name].mean(0))
        per_seed = values[name].tolist()
        summary[name] = interval(
            float(values[name].mean()), low, high, better, seeds_interval=t_interval(per_seed), per_seed=per_seed
        )
    if reference is not None:
        reference_values, reference_draws = _values_and_draws(reference, counts)
        difference = draws["fvu"] - reference_draws["fvu"]
        low, high = percentile_interval(difference.mean(0))
        by_seed = (values["fvu"] - reference_values["fvu"]).tolist()
        summary["fvu_minus_optimum"] = interval(
            float(torch.tensor(by_seed).double().mean()),
            low,
            high,
            False,
            seeds_interval=t_interval(by_seed),
            per_seed=by_seed,
        )
    return summary


def _values_and_draws(seeds: list[RowErrors], counts: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Metrics per seed (seeds,) and per seed and draw (seeds, draws)."""
    ones = counts.new_ones(1, counts.shape[1])
    values = [metric_draws(rows, ones) for rows in seeds]
    draws = [metric_draws(rows, counts) for rows in seeds]
    stack = {name: torch.stack([d[name] for d in draws]).cpu() for name in HIGHER_IS_BETTER}
    return {name: torch.cat([v[name] for v in values]).cpu() for name in HIGHER_IS_BETTER}, stack
