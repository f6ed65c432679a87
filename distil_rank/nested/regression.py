"""Regression of x on z from their joint moments: OLS, ridge (GCV) or principal components, as one filter on one `eigh`.

With Cov z = Q diag(L) Q^T (descending), C = Q^T Cov(z, x) and filter factors f in [0, 1]:

    W^T = Q diag(f / L) C        ols: f = 1     pcr: f = 1 for the first q     ridge: f = L / (L + penalty)

Directions of z whose variance is below eps * k * L_1 (numerically null: LayerNorm outputs have one) get f = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments

REGRESSIONS = ("ols", "ridge", "pcr")
COMPONENTS = ("mp", "held-out")
PENALTIES = torch.logspace(-10, 3, 66, dtype=torch.float64)  # in units of the mean eigenvalue of Cov z


@dataclass(frozen=True)
class Fit:
    """How the regression was chosen."""

    regression: str
    rank: int  # numerical rank of the prefix
    components: int | None = None  # kept by pcr
    rule: str | None = None  # of pcr: mp, held-out or given
    penalty: float | None = None  # of ridge, in the units of Cov z


def regress(
    joint: Moments, prefix: int, regression: str, components: str | int = "mp", held_out: Moments | None = None
) -> tuple[Tensor, Fit]:
    """Coefficients W (k_x, k_z) of x on z from the joint moments of [z, x], z being the first `prefix` features."""
    check_regression(regression, components)
    covariance = joint.covariance
    L, Q = (t.flip(-1) for t in torch.linalg.eigh(covariance[:prefix, :prefix]))
    null = torch.finfo(torch.float64).eps * prefix * float(L[0])
    rank = int(L.gt(null).sum())
    if rank == 0:
        raise InputError("a prefix that varies required, got constant features; check the embeddings")
    C = Q.T @ covariance[:prefix, prefix:]
    filters = (torch.arange(prefix) < rank).double()
    fit = Fit(regression, rank)
    if regression == "ridge":
        penalty = gcv_penalty(L.clamp_min(0), C, float(covariance.diagonal()[prefix:].sum()), joint.count)
        filters = L / (L + penalty)
        fit = Fit(regression, rank, penalty=penalty)
    elif regression == "pcr":
        if components == "mp":
            edge = marchenko_pastur_edge(L, joint.count)
            q = int(L.gt(edge).sum())
        elif components == "held-out":
            q = held_out_components(joint, prefix, Q, L, C, rank, held_out)
        else:
            q = int(components)
        q = min(max(q, 1), rank)
        filters = (torch.arange(prefix) < q).double()
        fit = Fit(regression, rank, components=q, rule=components if isinstance(components, str) else "given")
    ratio = torch.where(filters > 0, filters / torch.where(L > 0, L, 1.0), 0.0)
    return (Q * ratio @ C).T.contiguous(), fit


def check_regression(regression: str, components: str | int) -> None:
    if regression not in REGRESSIONS:
        raise InputError(f"regression must be one of {', '.join(REGRESSIONS)}, got {regression!r}")
    if isinstance(components, str) and components not in COMPONENTS:
        raise InputError(f"components must be {', '.join(COMPONENTS)} or a number, got {components!r}")
    if isinstance(components, int) and components < 1:
        raise InputError(f"components must be at least 1, got {components}")


def marchenko_pastur_edge(eigenvalues: Tensor, rows: float) -> float:
    """sigma^2 (1 + sqrt(k / n))^2 with sigma^2 the median eigenvalue: the rule published for Reverse Distillation.

    The upper edge of the spectrum of pure noise (Marchenko and Pastur, 1967). Taking the median for the noise level
    keeps about half of all components whatever the spectrum once n >> k.
    """
    return float(eigenvalues.median()) * (1 + (len(eigenvalues) / rows) ** 0.5) ** 2


def gcv_penalty(L: Tensor, C: Tensor, variance: float, rows: float) -> float:
    """Penalty of ridge with the least generalised cross-validation score n RSS / (n - df)^2 (Golub, Heath, Wahba 1979).

    L (k,) eigenvalues of Cov z, C (k, k_x) = Q^T Cov(z, x), `variance` = trace Cov x; the mean counts as one degree.
    """
    penalties = PENALTIES * L.mean()
    strength = C.square().sum(1)
    shrunk = L + penalties[:, None]  # (penalties, k)
    rss = variance - (2 * strength / shrunk - L * strength / shrunk.square()).sum(1)
    degrees = 1 + (L / shrunk).sum(1)
    score = rss.clamp_min(0) / (1 - degrees / rows).square()
    score = torch.where(degrees < rows, score, torch.inf)
    return float(penalties[score.argmin()])


def held_out_components(
    joint: Moments, prefix: int, Q: Tensor, L: Tensor, C: Tensor, rank: int, held_out: Moments | None
) -> int:
    """Number of components with the least squared error on the held-out rows; the whole curve in closed form."""
    if held_out is None or held_out.count < 2:
        raise InputError(
            "held-out proteins required to choose the components, got none; set held_out above 0, or use mp"
        )
    shift = held_out.mean - joint.mean
    second = held_out.covariance + torch.outer(shift, shift)  # about the fitted mean
    Q, T = Q[:, :rank], C[:rank] / L[:rank, None]  # T (rank, k_x): coefficients on the components
    gram = (Q.T @ second[:prefix, :prefix] @ Q) * (T @ T.T)
    gain = ((Q.T @ second[:prefix, prefix:]) * T).sum(1)
    # error(q) - error(0) = sum_{i,j<=q} gram_ij - 2 sum_{i<=q} gain_i
    error = gram.cumsum(0).cumsum(1).diagonal() - 2 * gain.cumsum(0)
    return int(error.argmin()) + 1
