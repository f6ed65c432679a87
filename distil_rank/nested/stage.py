"""One step r -> p of Reverse Distillation: what the larger model adds to a nested prefix, from joint moments alone.

With z = nested_r (k_r,) and x = raw_p (k_p,):

    f(z) = mean_x + W (z - mean_z)          regression of x on z
    R    = (x - f(z)) / scale               residual, in units of `scale` (ones unless features are scaled)
    V    = the m leading eigenvectors of Cov R
    nested_p = [z, V^T R]

The mean of R is zero on the fitted rows, so V^T R is a plain PCA of the residual. The reconstruction of x is f(z) + scale
V V^T R; its error is exactly the sum of Cov R's remaining eigenvalues. With OLS the new block is uncorrelated with z, and
no representation of the same width that keeps z reconstructs x better; with PCR that holds towards the kept components.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.nested.regression import Fit, regress
from distil_rank.core.moments import Moments


@dataclass(frozen=True)
class Stage:
    """A fitted step r -> p, float64, for z (..., k_r) and x (..., k_p)."""

    mean_prefix: Tensor  # (k_r,)
    mean_large: Tensor  # (k_p,)
    weight: Tensor  # W (k_p, k_r)
    scale: Tensor  # (k_p,)
    directions: Tensor  # V (k_p, m), orthonormal columns, signs fixed
    eigenvalues: Tensor  # of Cov R, all of them, descending (k_p,)
    fit: Fit  # how W was chosen

    @property
    def added(self) -> int:
        """Number of new directions m."""
        return self.directions.shape[1]

    def block(self, z: Tensor, x: Tensor, count: int | None = None) -> Tensor:
        """The first `count` new coordinates V^T R (..., count), float64."""
        V = self.directions[:, :count].to(z.device)
        A = (V / self.scale.to(z.device)[:, None]).T  # (count, k_p); A W is small: no k_p-wide residual is formed
        centred_z = z.double() - self.mean_prefix.to(z.device)
        centred_x = x.double() - self.mean_large.to(z.device)
        return centred_x @ A.T - centred_z @ (A @ self.weight.to(z.device)).T

    def reconstruct(self, z: Tensor, block: Tensor) -> Tensor:
        """raw_p (..., k_p) from the prefix and the first new coordinates (..., <= m), float64."""
        z, block = z.double(), block.double()
        V = self.directions[:, : block.shape[-1]].to(z.device)
        W, scale = self.weight.to(z.device), self.scale.to(z.device)
        return self.mean_large.to(z.device) + (z - self.mean_prefix.to(z.device)) @ W.T + (block @ V.T) * scale

    def scores(self, joint: Moments) -> dict[str, float]:
        """R^2 of raw_p on the rows behind the joint moments of [z, x], in the stage's units.

        `regression`: from the prefix alone; `reconstruction`: from the prefix and the new block.
        """
        error, variance = residual_covariance(joint, self)
        total = float(error.trace())
        kept = float(((self.directions.T @ error) * self.directions.T).sum())
        return {"regression": 1 - total / variance, "reconstruction": 1 - (total - kept) / variance}


def fit_stage(
    joint: Moments,
    prefix: int,
    added: int,
    regression: str = "ols",
    components: str | int = "mp",
    scale_features: bool = False,
    held_out: Moments | None = None,
    random: torch.Generator | None = None,
    name: str = "stage",
) -> Stage:
    """Fit a step from the joint moments of [nested_r, raw_p].

    `prefix` = k_r, `added` = m. `regression` is ols, ridge or pcr; `components` (of pcr) is mp, held-out or a number.
    `scale_features` works in units of standard deviations, so that outlier features do not rule. `held_out` are the
    joint moments of other proteins. With `random`, V is a random orthonormal completion instead of the residual's PCA
    (a baseline). Raises InputError where the rows do not determine m directions.
    """
    large = joint.dim - prefix
    if not (1 <= prefix < joint.dim and 1 <= added <= large):
        raise ValueError(f"1 <= prefix < {joint.dim} and 1 <= added <= {large} required, got {prefix} and {added}")
    covariance = joint.covariance
    deviation = covariance.diagonal().sqrt() if scale_features else torch.ones_like(joint.mean)
    deviation = torch.where(deviation > 0, deviation, 1.0)  # a constant feature has no unit of its own
    scaled, scaled_held_out = (None if m is None else rescaled(m, deviation) for m in (joint, held_out))
    assert scaled is not None
    scaled_weight, fit = regress(scaled, prefix, regression, components, scaled_held_out)
    regressors = {"ols": prefix, "ridge": 0}.get(regression, fit.components or 0)
    needed = regressors + added + 1
    if joint.count < needed:
        raise InputError(
            f"{name}: at least {needed} rows required ({regressors} regressors, {added} directions and a mean), got"
            f" {joint.count:.0f}; give more proteins, or ask for fewer components or directions"
        )
    weight = deviation[prefix:, None] * scaled_weight / deviation[:prefix]
    none = joint.mean.new_zeros(large, 0)
    stage = Stage(joint.mean[:prefix], joint.mean[prefix:], weight, deviation[prefix:], none, joint.mean, fit)
    residual, variance = residual_covariance(joint, stage)
    eigenvalues, basis = (t.flip(-1) for t in torch.linalg.eigh(residual))
    floor = torch.finfo(torch.float64).eps * joint.dim * variance
    if random is None and float(eigenvalues[added - 1]) <= floor:
        raise InputError(
            f"{name}: a residual of {added} directions required, got {int((eigenvalues > floor).sum())} that carry"
            " variance; the larger embedding is (almost) a linear function of the prefix: ask for fewer directions"
        )
    if random is not None:
        basis = torch.linalg.qr(torch.randn(large, large, generator=random, dtype=torch.float64))[0]
    V = fixed_signs(basis[:, :added]).contiguous()
    return replace(stage, directions=V, eigenvalues=eigenvalues.clamp_min(0))


def residual_covariance(joint: Moments, stage: Stage) -> tuple[Tensor, float]:
    """Second moment of R about zero (k_p, k_p) on the rows behind `joint`, and the variance of raw_p in those units."""
    k_r, W = stage.weight.shape[1], stage.weight
    covariance = joint.covariance
    among, across, own = covariance[:k_r, :k_r], covariance[:k_r, k_r:], covariance[k_r:, k_r:]
    half = W @ (across - 0.5 * among @ W.T)  # Cov(x - W z) = Cov x - half - half^T
    bias = joint.mean[k_r:] - stage.mean_large - W @ (joint.mean[:k_r] - stage.mean_prefix)
    error = (own - half - half.T + torch.outer(bias, bias)) / stage.scale[:, None] / stage.scale
    return error, float((own.diagonal() / stage.scale.square()).sum())


def rescaled(moments: Moments, unit: Tensor) -> Moments:
    """Moments of x / unit, feature by feature."""
    scatter = moments.scatter / unit[:, None] / unit
    return Moments.from_state(
        {"count": torch.tensor(moments.count, dtype=torch.float64), "mean": moments.mean / unit, "scatter": scatter}
    )


def fixed_signs(basis: Tensor) -> Tensor:
    """Each column (d,) turned so that its entry of largest magnitude is positive."""
    pivots = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(pivots < 0, -1.0, 1.0)
