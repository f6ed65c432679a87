"""One step r -> p of Reverse Distillation: what the larger model adds to a nested prefix.

With z = nested_r (k_r,) and x = raw_p (k_p,), and nothing but their joint moments:

    f(z) = mean_x + W (z - mean_z)          regression of x on z
    R    = x - f(z)                         residual
    V    = the m leading eigenvectors of Cov R
    nested_p = [z, V^T R]

The mean of R is zero on the fitted rows, so V^T R is a plain PCA of the residual. The
reconstruction of x is f(z) + V V^T R; its error is exactly the sum of Cov R's remaining
eigenvalues. With OLS the new block is uncorrelated with z, and no representation of the same width
that keeps z reconstructs x better; with PCR that holds towards the kept components.

Every regression is one filter on one `eigh`. With Cov z = Q diag(L) Q^T (descending),
C = Q^T Cov(z, x) and filter factors f in [0, 1]:

    W^T = Q diag(f / L) C      ols: f = 1; pcr: f = 1 for the first q; ridge: f = L / (L + penalty)

Directions of z whose variance is below 1e-8 L_1 (numerically null: LayerNorm outputs have one) get
f = 0.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments

REGRESSIONS = ("ols", "ridge", "pcr")
COMPONENTS = ("mp", "held-out")
PENALTIES = torch.logspace(-10, 3, 66, dtype=torch.float64)  # of the mean eigenvalue of Cov z
NULL = 1e-8  # of the largest variance: what float32 products leave of a direction without any


@dataclass(frozen=True)
class Fit:
    """How the regression was chosen."""

    regression: str
    rank: int  # numerical rank of the prefix
    components: int | None = None  # kept by pcr
    rule: str | None = None  # of pcr: mp, held-out or given
    penalty: float | None = None  # of ridge, in the units of Cov z


@dataclass(frozen=True)
class Stage:
    """A fitted step r -> p, float64, for z (..., k_r) and x (..., k_p)."""

    mean_prefix: Tensor  # (k_r,)
    mean_large: Tensor  # (k_p,)
    weight: Tensor  # W (k_p, k_r)
    directions: Tensor  # V (k_p, m), orthonormal columns, signs fixed
    eigenvalues: Tensor  # of Cov R, all of them, descending (k_p,)
    fit: Fit  # how W was chosen

    @property
    def added(self) -> int:
        """Number of new directions m."""
        return self.directions.shape[1]

    def block(self, z: Tensor, x: Tensor, count: int | None = None) -> Tensor:
        """The first `count` new coordinates V^T R (..., count), float64."""
        A = self.directions[:, :count].T.to(z.device)  # (count, k_p): no wide residual
        centered_z = z.double() - self.mean_prefix.to(z.device)
        centered_x = x.double() - self.mean_large.to(z.device)
        return centered_x @ A.T - centered_z @ (A @ self.weight.to(z.device)).T

    def reconstruct(self, z: Tensor, block: Tensor) -> Tensor:
        """raw_p (..., k_p) from the prefix and the first new coordinates (..., <= m), float64."""
        z, block = z.double(), block.double()
        V, W = self.directions[:, : block.shape[-1]].to(z.device), self.weight.to(z.device)
        predicted = self.mean_large.to(z.device) + (z - self.mean_prefix.to(z.device)) @ W.T
        return predicted + block @ V.T

    def extended(self, nested: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The affine map from raw embeddings side by side to nested_p, from that to nested_r."""
        A = self.directions.T
        B = A @ self.weight
        old = torch.cat([nested, nested.new_zeros(len(nested), A.shape[1])], 1)
        matrix = torch.cat([old, torch.cat([-B @ nested, A], 1)])
        return matrix, torch.cat([shift, B @ (self.mean_prefix - shift) - A @ self.mean_large])

    def scores(self, joint: Moments) -> dict[str, float]:
        """R^2 of raw_p on the rows behind the joint moments of [z, x].

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
    held_out: Moments | None = None,
    random: torch.Generator | None = None,
    name: str = "stage",
) -> Stage:
    """Fit a step from the joint moments of [nested_r, raw_p].

    `prefix` = k_r, `added` = m. `components` (of pcr) is mp, held-out or a number; `held_out` are
    the joint moments of other proteins. With `random`, V is a random orthonormal completion instead
    of the residual's PCA (a baseline). InputError where the rows do not determine m directions.
    """
    large = joint.dim - prefix
    weight, fit = regress(joint, prefix, regression, components, held_out)
    regressors = {"ols": prefix, "ridge": 0}.get(regression, fit.components or 0)
    needed = regressors + added + 1
    if joint.count < needed:
        raise InputError(
            f"{name}: at least {needed} rows required ({regressors} regressors, {added} directions"
            f" and a mean), got {joint.count:.0f}; give more proteins, or ask for fewer components"
            " or directions"
        )
    none = joint.mean.new_zeros(large, 0)
    means = joint.mean[:prefix], joint.mean[prefix:]
    stage = Stage(*means, weight, none, joint.mean, fit)
    residual, variance = residual_covariance(joint, stage)
    eigenvalues, basis = (t.flip(-1) for t in torch.linalg.eigh(residual))
    carrying = int((eigenvalues > 0.1 * NULL * variance).sum())
    if random is None and carrying < added:
        raise InputError(
            f"{name}: a residual of {added} directions required, got {carrying} that carry"
            " variance; the larger embedding is (almost) a linear function of the prefix: ask for"
            " fewer"
        )
    if random is not None:
        normal = torch.randn(large, large, generator=random, dtype=torch.float64)
        basis = torch.linalg.qr(normal)[0]
    V = fixed_signs(basis[:, :added]).contiguous()
    return replace(stage, directions=V, eigenvalues=eigenvalues.clamp_min(0))


def residual_covariance(joint: Moments, stage: Stage) -> tuple[Tensor, float]:
    """Second moment of R about zero (k_p, k_p) on the rows behind `joint`, and raw_p's variance."""
    k_r, W = stage.weight.shape[1], stage.weight
    covariance = joint.covariance
    among, across, own = covariance[:k_r, :k_r], covariance[:k_r, k_r:], covariance[k_r:, k_r:]
    half = W @ (across - 0.5 * among @ W.T)  # Cov(x - W z) = Cov x - half - half^T
    bias = joint.mean[k_r:] - stage.mean_large - W @ (joint.mean[:k_r] - stage.mean_prefix)
    return own - half - half.T + torch.outer(bias, bias), float(own.trace())


def fixed_signs(basis: Tensor) -> Tensor:
    """Each column (d,) turned so that its entry of largest magnitude is positive."""
    pivots = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(pivots < 0, -1.0, 1.0)


def regress(
    joint: Moments,
    prefix: int,
    regression: str,
    components: str | int = "mp",
    held_out: Moments | None = None,
) -> tuple[Tensor, Fit]:
    """W (k_x, k_z) of x on z from the joint moments of [z, x], z the first `prefix` features."""
    check_regression(regression, components)
    covariance = joint.covariance
    L, Q = (t.flip(-1) for t in torch.linalg.eigh(covariance[:prefix, :prefix]))
    rank = min(int(L.gt(NULL * L[0]).sum()), int(joint.count) - 1)
    if rank < 1:
        raise InputError("a prefix that varies required, got constant features: another embedding")
    C = Q.T @ covariance[:prefix, prefix:]
    kept, fit = rank, Fit(regression, rank)
    if regression == "pcr":
        if components == "mp":
            kept = published_components(L, joint.count)
        elif components == "held-out":
            kept = held_out_components(joint, prefix, Q, L, C, rank, held_out)
        else:
            kept = int(components)
        kept = min(max(kept, 1), rank)
        rule = components if isinstance(components, str) else "given"
        fit = Fit(regression, rank, components=kept, rule=rule)
    filters = (torch.arange(prefix) < kept).double()
    if regression == "ridge":
        variance = float(covariance.diagonal()[prefix:].sum())
        penalty = gcv_penalty(L, C, variance, joint.count, rank)
        filters, fit = filters * L / (L + penalty), Fit(regression, rank, penalty=penalty)
    ratio = torch.where(filters > 0, filters / torch.where(L > 0, L, 1.0), 0.0)
    return (Q * ratio @ C).T.contiguous(), fit


def check_regression(regression: str, components: str | int) -> None:
    if regression not in REGRESSIONS:
        raise InputError(f"regression must be one of {', '.join(REGRESSIONS)}, got {regression!r}")
    if isinstance(components, str) and components not in COMPONENTS:
        known = ", ".join(COMPONENTS)
        raise InputError(f"components must be {known} or a number, got {components!r}")
    if isinstance(components, int) and components < 1:
        raise InputError(f"components must be at least 1, got {components}")


def published_components(L: Tensor, rows: float) -> int:
    """Components that the released code of Reverse Distillation keeps; L (k,) descending.

    Those above the upper edge s (1 + sqrt(k / n))^2 of the spectrum of noise of variance s
    (Marchenko and Pastur, 1967); s is the median of the eigenvalues below the edge of a first pass,
    in which s is their mean. Of n < k rows, only n eigenvalues count. Where none is above the edge,
    as many as carry 95 % of the variance.
    """
    edge = (1 + (len(L) / rows) ** 0.5) ** 2
    L = L[: int(rows)].clamp_min(0)
    below = L[edge * L.mean() > L]  # the mean itself is below: never empty
    kept = int(L.gt(edge * below.quantile(0.5)).sum())
    return kept or 1 + int((L.cumsum(0) < 0.95 * L.sum()).sum())


def gcv_penalty(L: Tensor, C: Tensor, variance: float, rows: float, rank: int) -> float:
    """Penalty of ridge with the least generalized cross-validation score n RSS / (n - df)^2.

    Golub, Heath, Wahba 1979. L (k,) eigenvalues of Cov z, C (k, k_x) = Q^T Cov(z, x), `variance` =
    trace Cov x; the mean counts as one degree. RSS and n - df are those of OLS and what shrinking
    adds: both vanish with the penalty where rows <= prefix, and their ratio must not be rounding.
    """
    penalties = PENALTIES * L.mean()
    explained = C[:rank].square().sum(1) / L[:rank]
    left = penalties[:, None] / (L[:rank] + penalties[:, None])  # (penalties, rank)
    spare = rows - 1 - rank  # no rows to spare: OLS leaves no residual
    unexplained = max(variance - float(explained.sum()), 0.0) if spare > 0 else 0.0
    score = (unexplained + left.square() @ explained) / (spare + left.sum(1)).square()
    return float(penalties[score.argmin()])


def held_out_components(
    joint: Moments,
    prefix: int,
    Q: Tensor,
    L: Tensor,
    C: Tensor,
    rank: int,
    held_out: Moments | None,
) -> int:
    """Components with the least squared error on the held-out rows; the curve in closed form."""
    if held_out is None or held_out.count < 2:
        raise InputError(
            "held-out proteins required to choose the components, got none; leave some out"
            " (--held-out above 0), or use mp"
        )
    shift = held_out.mean - joint.mean
    second = held_out.covariance + torch.outer(shift, shift)  # about the fitted mean
    Q, T = Q[:, :rank], C[:rank] / L[:rank, None]  # T (rank, k_x): coefficients on the components
    gram = (Q.T @ second[:prefix, :prefix] @ Q) * (T @ T.T)
    gain = ((Q.T @ second[:prefix, prefix:]) * T).sum(1)
    # error(q) - error(0) = sum_{i,j<=q} gram_ij - 2 sum_{i<=q} gain_i
    error = gram.cumsum(0).cumsum(1).diagonal() - 2 * gain.cumsum(0)
    return int(error.argmin()) + 1
