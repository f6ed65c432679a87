"""A metric G of a layer's output, damped, and its roots."""

import torch
from torch import Tensor

DAMPING = 1e-4  # of the mean of G's diagonal: directions nobody reads still count a little


def metric_roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^T R = G, and its inverse, of a positive semidefinite G (d, d), damped.

    The Cholesky factor; where rounding has made G indefinite, its square root.
    """
    symmetric = (metric + metric.T) / 2
    L, failed = torch.linalg.cholesky_ex(damped(symmetric))
    if not failed:
        return L.T, torch.linalg.solve_triangular(L.T, torch.eye(len(L)).to(L), upper=True)
    values, vectors = torch.linalg.eigh(symmetric)
    values = damped(values.clamp_min(0).diag()).diagonal()
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def damped(metric: Tensor, damping: float = DAMPING) -> Tensor:
    """G + damping * (mean of its diagonal) * I."""
    extra = damping * metric.trace().clamp_min(1e-300) / len(metric)
    return metric + extra * torch.eye(len(metric)).to(metric)
