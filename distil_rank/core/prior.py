"""Prior moments: what other proteins say about the covariance, for users with few of their own.

The blend (1 - a) S_own + a S_prior, with a chosen by cross-validation over folds of the user's
proteins, is worth far more than shrinkage to the identity, which is what remains without a prior
(the weight's own prior: Cov y is drawn to W W^T). Zero is allowed, and a must earn its place: it is
used only where the held-out loss falls by more than one standard error over the folds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import leading_directions
from distil_rank.core.moments import Moments

WEIGHTS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0)
OWN_WEIGHTS = (0.0, 0.03, 0.1, 0.3)  # of the weight's own prior
FOLDS = 5


@dataclass(frozen=True)
class Blend:
    """Chosen weights of the prior, and the held-out loss expected of them."""

    weight: float  # of the prior covariance
    mean_weight: float  # of the prior mean
    relative_loss: float  # cross-validated, over that without a prior; 1 where it is not used


def folds_of(x: Tensor, folds: int = FOLDS) -> list[Moments]:
    """Moments of the rows of x (n, d) in folds, each of at least one row."""
    return [Moments.of(x[fold::folds]) for fold in range(min(folds, len(x)))]


def merged(parts: list[Moments]) -> Moments:
    total = Moments(parts[0].dim, parts[0].mean.device)
    for part in parts:
        total.merge(part)
    return total


def blended(own: Moments, prior: Moments, blend: Blend) -> Moments:
    """Moments of as many rows as `own`, with the blend's mean and covariance."""
    a, m = blend.weight, blend.mean_weight
    if a == m == 0:
        return own
    mean = (1 - m) * own.mean + m * prior.mean.to(own.mean)
    covariance = (1 - a) * own.covariance + a * prior.covariance.to(own.mean)
    return Moments.given(own.count, mean, own.count * covariance)


def choose(
    folds: list[Moments],
    prior: Moments,
    rank: int,
    weights: tuple[float, ...],
    left: Tensor,
    means: bool = True,
) -> Blend:
    """Weights by cross-validation at one rank.

    Folds and prior are moments of the layer's output left x, up to a rotation. means: whether the
    prior's mean may be used too.
    """
    folds = [fold for fold in folds if fold.count > 0]
    choices = [Blend(a, m, 1.0) for a in weights for m in sorted({0.0, a * means})]
    if len(folds) < 2:
        return choices[0]
    losses = torch.zeros(len(choices), len(folds), dtype=torch.float64)
    for f, fold in enumerate(folds):
        own = merged(folds[:f] + folds[f + 1 :])
        for i, choice in enumerate(choices):
            mixed = blended(own, prior, choice)
            if choice.mean_weight == 0:  # the mean changes no direction
                U = leading_directions(mixed.covariance, rank, left)[1]
            shift = fold.mean - mixed.mean
            missed = fold.covariance.trace() - ((fold.covariance @ U) * U).sum()
            losses[i, f] = missed + shift @ shift - (U.T @ shift).square().sum()
    counts = torch.tensor([fold.count for fold in folds], dtype=torch.float64)
    shares = counts / counts.sum()
    totals = losses @ shares
    best = int(totals.argmin())
    saved = losses[0] - losses[best]
    error = (shares.square() @ (saved - shares @ saved).square()).sqrt()
    if best == 0 or float(totals[0] - totals[best]) <= float(error) or totals[0] <= 0:
        return choices[0]
    return replace(choices[best], relative_loss=float(totals[best] / totals[0]))


def blended_moments(
    weight: Tensor, side: str, folds: list[Moments], prior: Moments | None, rank: int
) -> tuple[Moments, Blend]:
    """Moments of all folds, blended with a prior of the same side where that helps at this rank.

    Without a prior, the weight's own takes its place: inputs equally likely in all directions,
    around the user's mean.
    """
    W, total = weight.detach().to(folds[0].mean), merged(folds)
    if prior is not None and prior.dim != total.dim:
        raise InputError(
            f"a prior of {total.dim} features required for this layer, got {prior.dim}; remake it"
        )
    known = weights_own(W, side, total) if prior is None else prior
    seen, expected, left = folds, known, W
    if side == "input":
        # the loss is that of the output, or of its rotation into min(d_in, d_out) dimensions
        left = torch.linalg.qr(W).R if len(W) > W.shape[1] else W
        seen, expected = [fold.mapped(left) for fold in folds], known.mapped(left)
    weights = OWN_WEIGHTS if prior is None else WEIGHTS
    blend = choose(seen, expected, min(rank, expected.dim), weights, left, prior is not None)
    return blended(total, known, blend), blend


def weights_own(W: Tensor, side: str, own: Moments) -> Moments:
    """Moments of inputs equally likely in all directions, or of what W makes of them.

    The variance of the output is that in `own`.
    """
    shape = torch.eye(W.shape[1]).to(W) if side == "input" else W @ W.T
    variance = ((W @ own.covariance) * W).sum() if side == "input" else own.covariance.trace()
    return Moments.given(1.0, own.mean, variance / W.square().sum().clamp_min(1e-300) * shape)
