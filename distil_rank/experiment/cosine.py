"""The closed form for the combined loss MSE + w (1 - cosine), and a bound on the cosine of any low-rank student.

To second order 1 - cos(y, y') = |P e|^2 / (2 |y|^2), where e = y' - y and P projects out y. So the combined loss is locally
a weighted least squares with row weights 1/d_out + w / (2 |y|^2): the optimum with weighted mean and covariance, iterated.
"""

import torch
from torch import Tensor

from distil_rank.core.lowrank import leading_eigenpairs
from distil_rank.experiment.students import distillation_loss
from distil_rank.core.moments import Moments

TOLERANCE = 1e-5  # stop when a round lowers the loss by less than this, relatively


def cosine_aware_optimum(
    weight: Tensor, bias: Tensor | None, outputs: Tensor, rank: int, cosine_weight: float = 0.1, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Factors A (r, d_in), B (d_out, r), bias (d_out,) in float64 for the combined loss, and the loss of every round.

    outputs (n, d_out) are the teacher's on the training rows. Round 0 is the plain optimum; a round is kept only if it
    lowers the loss, so the result is never worse than the plain optimum on these rows.
    """
    W = weight.detach().double()
    c = torch.zeros(len(W)).to(W) if bias is None else bias.detach().double()
    y = outputs.double()
    row_weights = torch.ones(len(y)).to(y)
    losses: list[float] = []
    best = torch.zeros(0), torch.zeros(0)
    for _ in range(rounds + 1):
        moments = Moments.of(y, row_weights)
        _, U = leading_eigenpairs(moments.covariance, rank)
        prediction = moments.mean + (y - moments.mean) @ U @ U.T
        loss = float(distillation_loss(prediction, y, cosine_weight)[0])
        if losses and loss >= losses[-1]:
            break
        best = U, moments.mean
        losses.append(loss)
        if len(losses) > 1 and losses[-2] - loss < TOLERANCE * losses[-2]:
            break
        p2 = prediction.square().sum(1).clamp_min(1e-16)
        cosine = (prediction * y).sum(1) / (p2 * y.square().sum(1).clamp_min(1e-16)).sqrt()
        row_weights = 1 / y.shape[1] + cosine_weight / 2 * cosine.clamp_min(0) / p2
    U, mean = best
    A = U.T @ W
    return A, U, mean - U @ (U.T @ (mean - c)), losses


def cosine_bound(outputs: Tensor, rank: int) -> float:
    """No affine student of this rank has a mean cosine above sqrt(sum_{i<=r+1} lambda_i(E y y^T / |y|^2)) on these rows.

    Its outputs lie in r directions and the bias; cos(y, y') is at most the length of y / |y| within that subspace, and
    by Jensen the mean length is at most the root of the mean square. outputs (n, d_out).
    """
    y = torch.nn.functional.normalize(outputs.double(), dim=1)
    gram = y @ y.T if len(y) < y.shape[1] else y.T @ y
    return float((torch.linalg.eigvalsh(gram)[-(rank + 1) :].sum() / len(y)).clamp(0, 1).sqrt())
