"""The slow, obvious versions that clever formulas are held against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population covariance, with all data at hand."""
    x = x.double()
    return x.mean(0), torch.cov(x.T, correction=0).reshape(x.shape[1], x.shape[1])


def combined_loss(prediction: Tensor, target: Tensor, weight: float) -> Tensor:
    """MSE + weight (1 - cosine), by torch's own functions."""
    return (
        F.mse_loss(prediction, target)
        + weight * (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()
    )


def distill_one(x, y, A, B, b, steps, batch, lr, weight_decay, cosine_weight, generator):
    """One student, one plain loop with autograd."""
    A, B, b = (t.clone().requires_grad_() for t in (A, B, b))
    optimizer = torch.optim.AdamW([A, B, b], lr=lr, weight_decay=weight_decay)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        loss = combined_loss(F.linear(F.linear(x[rows], A), B, b), y[rows], cosine_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return A.detach(), B.detach(), b.detach(), losses


def reduced_rank_regression(x: Tensor, y: Tensor, rank: int) -> Tensor:
    """Predictions (n, d_out) of the best rank-r affine map from x to y on these rows.

    Least squares, then PCA of the fit.
    """
    ones = torch.cat([x, torch.ones(len(x), 1).to(x)], 1)
    fit = ones @ torch.linalg.lstsq(ones, y, driver="gelsd").solution
    mean = fit.mean(0)
    U, s, Vh = torch.linalg.svd(fit - mean, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank] + mean
