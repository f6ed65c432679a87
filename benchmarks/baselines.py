"""Other people's layer compressors, as plainly as they can be written.

All take the teacher y = W x + c as weight (d_out, d_in), bias (d_out,) and rows x (n, d_in), and
return A (r, d_in), B (d_out, r) and the bias, in float64. With `refit`, a baseline gets its best
form: centered rows and the bias that makes it unbiased.
"""

import torch
from torch import Tensor

from distil_rank.core import functions

Factors = tuple[Tensor, Tensor, Tensor]


def finish(W: Tensor, c: Tensor, x: Tensor, A: Tensor, B: Tensor, refit: bool) -> Factors:
    mean = x.mean(0)
    return A, B, c + (W @ mean - B @ (A @ mean)) if refit else c


def plain_svd(W: Tensor, c: Tensor, x: Tensor, rank: int, refit: bool = True) -> Factors:
    """Truncated SVD of the weight alone."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return finish(W, c, x, s[:rank, None].sqrt() * Vh[:rank], U[:, :rank] * s[:rank].sqrt(), refit)


def asvd(
    W: Tensor, c: Tensor, x: Tensor, rank: int, refit: bool = True, alpha: float = 0.5
) -> Factors:
    """Activation-aware diagonal scaling (Yuan et al. 2023): SVD of W diag(mean |x|^alpha)."""
    scale = x.abs().mean(0).clamp_min(1e-8) ** alpha
    U, s, Vh = torch.linalg.svd(W * scale, full_matrices=False)
    return finish(
        W, c, x, s[:rank, None].sqrt() * Vh[:rank] / scale, U[:, :rank] * s[:rank].sqrt(), refit
    )


def svd_llm(W: Tensor, c: Tensor, x: Tensor, rank: int, refit: bool = True) -> Factors:
    """Truncation-aware whitening (Wang et al. 2024): SVD of W L, L L^T the rows' second moments.

    Where those are not positive definite, the diagonal is lifted until they are.
    """
    rows = x - x.mean(0) if refit else x
    S = rows.T @ rows / len(rows)
    lift = 0.0
    while True:
        L, info = torch.linalg.cholesky_ex(S + lift * torch.eye(len(S)).to(S))
        if not int(info):
            break
        lift = max(10 * lift, 1e-10 * float(S.diagonal().mean()))
    U, s, Vh = torch.linalg.svd(W @ L, full_matrices=False)
    A = torch.linalg.solve_triangular(L, s[:rank, None].sqrt() * Vh[:rank], upper=False, left=False)
    return finish(W, c, x, A, U[:, :rank] * s[:rank].sqrt(), refit)


def alternating(
    W: Tensor,
    c: Tensor,
    x: Tensor,
    rank: int,
    refit: bool = True,
    rounds: int = 20,
    ridge: float = 1e-6,
) -> Factors:
    """Alternating ridge regressions for B and A from the truncated SVD (Composer-style)."""
    rows = x - x.mean(0) if refit else x
    S = rows.T @ rows / len(rows)
    A, B, _ = plain_svd(W, c, x, rank)
    for _ in range(rounds):
        Z = A @ S @ A.T
        B = torch.linalg.solve(
            Z + ridge * Z.diagonal().mean() * torch.eye(rank).to(Z), A @ S @ W.T
        ).T
        G = B.T @ B
        A = torch.linalg.solve(G + ridge * G.diagonal().mean() * torch.eye(rank).to(G), B.T @ W)
    return finish(W, c, x, A, B, refit)


BASELINES = {"plain SVD": plain_svd, "ASVD": asvd, "SVD-LLM": svd_llm, "alternating": alternating}


def fvu(W: Tensor, c: Tensor, factors: Factors, x: Tensor) -> float:
    """Of a student's output on rows x, as a model of the teacher's."""
    A, B, bias = factors
    return functions.fvu(x @ A.T @ B.T + bias, x @ W.T + c)
