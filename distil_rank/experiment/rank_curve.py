"""Every rank at once: what the optimum loses on held-out rows, and the floor there, from one eigendecomposition."""

import torch
from torch import Tensor

from distil_rank.core.lowrank import Optimum, tail_fractions


def held_out_curve(solution: Optimum, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """FVU and mean cosine of the students of rank 0 ... k on held-out outputs (n, d_out); two (k + 1,) float64.

    With y - m = sum_i z_i u_i (m the fitted output mean), the rank-r student outputs m + sum_{i<=r} z_i u_i, so all ranks
    are cumulated sums over the columns of z = (y - m) U.
    """
    y = outputs.to(solution.mean)
    m = solution.weight @ solution.mean + solution.bias
    z = (y - m) @ solution.basis
    u = solution.basis.T @ m
    explained = z.square().sum(0)
    centred = y - y.mean(0)
    error = (y - m).square().sum() - torch.cat([explained.new_zeros(1), explained.cumsum(0)])
    inner = (y @ m)[:, None] + _cumulated(z * (z + u))
    length = m.square().sum() + _cumulated(z * (z + 2 * u))
    norms = (y.square().sum(1, keepdim=True) * length).clamp_min(1e-32).sqrt()
    return error.clamp_min(0) / centred.square().sum(), (inner / norms).mean(0)


def floor_curve(outputs: Tensor) -> Tensor:
    """FVU that no student of rank 0 ... d_out can beat on these outputs (n, d_out): (d_out + 1,), float64."""
    y = outputs.double()
    y = y - y.mean(0)
    gram = y @ y.T if len(y) < y.shape[1] else y.T @ y
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    curve = tail_fractions(eigenvalues)
    return torch.cat([curve, curve.new_zeros(max(0, y.shape[1] + 1 - len(curve)))])


def _cumulated(columns: Tensor) -> Tensor:
    """Cumulated sums over columns (n, k), starting at 0: (n, k + 1)."""
    return torch.cat([columns.new_zeros(len(columns), 1), columns.cumsum(1)], 1)
