"""The best low-rank student in closed form: every rank, any metric, a layer or any teacher.

A teacher's output y and the inputs x of its student have means m and mu; S = Cov x. A metric G >= 0
on the output (the identity unless given) has a root R, R^T R = G. Let M be the best linear map of
full rank: W for a layer y = W x + c, else the regression Cov(y, x) S^+. With (lambda_i, u_i) the
eigenpairs of R M S M^T R^T, descending, and U = [u_1 ... u_r], over all rank-r maps N and all b

    min E (y - N x - b)^T G (y - N x - b) = unexplained + sum_{i>r} lambda_i,

    attained by  N = B A,  B = R^{-1} U,  A = U^T R M,  b = m - B A mu,

where `unexplained` is what no linear map can do, 0 for a layer. (The best b centers the problem;
predictions then lie in an r-dimensional subspace, so PCA bounds every map, and the bound is
attained. Reduced-rank regression: Izenman, J. Multivariate Anal. 5, 1975.) A layer on its own
inputs needs no inverse of S, so a singular S (LayerNorm outputs, n < d) is no problem. Directions
that the rows leave open (n rows determine n - 1) are taken in the order of R M M^T R^T, as if
inputs were equally likely in all of them: the student is the same whatever the eigensolver returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.linear import LowRankLinear, check_rank
from distil_rank.core.metric import metric_roots
from distil_rank.core.moments import Moments, symmetric_product

RIDGE = 1e-3  # of the mean variance of changed inputs
NULL = 1e-12  # of the largest eigenvalue: below it the rows say nothing of a direction


@dataclass(frozen=True)
class Optimum:
    """Students of every rank up to k from one eigendecomposition (float64)."""

    map: Tensor  # M (d_out, d_in), in any dtype
    center: Tensor  # M mu (d_out,)
    output_mean: Tensor  # m (d_out,)
    eigenvalues: Tensor  # the k largest, descending (k,)
    basis: Tensor  # U (d_out, k), one eigenvector a column
    unexplained: float = 0.0  # loss that is left at rank k
    sides: tuple[Tensor, Tensor] | None = None  # R^T U and R^{-1} U; None: U, with no metric

    @property
    def tails(self) -> Tensor:
        """Loss at rank 0 (a constant: the variance in the metric), 1, ... k (k + 1,)."""
        return tails(self.eigenvalues, self.unexplained)

    @property
    def fvu(self) -> Tensor:
        """FVU of the best student of rank 0, 1, ... k on the fitted rows (k + 1,)."""
        return fractions(self.tails)

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """A (r, d_in), B (d_out, r) and bias (d_out,)."""
        check_rank(rank, min(*self.map.shape, len(self.eigenvalues)))
        left, B = (side[:, :rank] for side in self.sides or (self.basis, self.basis))
        if self.sides is not None:  # columns of B get length 1: so the factors fit into float16
            length = B.norm(dim=0)
            left, B = left * length, B / length
        A = left.T @ self.map.to(left)
        return A, B, self.output_mean - B @ (left.T @ self.center)

    def student(self, rank: int, dtype: torch.dtype = torch.float64) -> LowRankLinear:
        """The student in `dtype`; InputError where its range is too small for the factors."""
        student = LowRankLinear(*(t.to(dtype) for t in self.factors(rank)))
        require_finite(student)
        return student


def require_finite(student: nn.Module) -> None:
    """InputError where a weight overflowed."""
    bad = {name: t.dtype for name, t in student.state_dict().items() if not t.isfinite().all()}
    if bad:
        raise InputError(
            f"factors within the range of {next(iter(bad.values()))} required, got an overflow in"
            f" {' and '.join(bad)}; compress the layer in float32 or bfloat16"
        )


def optimum(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    rank: int | None = None,
    metric: Tensor | None = None,
) -> Optimum:
    """Best students of the layer y = W x + c from the moments of its inputs.

    weight (d_out, d_in), bias (d_out,) or None, metric (d_out, d_out) or None for the identity.
    Every rank up to min(d_in, d_out), or faster those up to `rank`.
    """
    if weight.shape[1] != moments.dim:
        raise ValueError(
            f"moments of {weight.shape[1]} features required for this layer, got {moments.dim}"
        )
    W = weight.detach().to(moments.mean)
    center = W @ moments.mean
    return _solve(W, weight, moments.covariance, center, _plus(center, bias), rank, metric)


def optimum_from_outputs(
    weight: Tensor,
    bias: Tensor | None,
    outputs: Moments,
    rank: int | None = None,
    metric: Tensor | None = None,
) -> Optimum:
    """The same from the moments of y = W x + c (d_out,): the inputs are not needed."""
    W, mean = weight.detach().to(outputs.mean), outputs.mean
    center = mean if bias is None else mean - bias.detach().to(mean)
    return _solve(W, weight, outputs.covariance, center, mean, rank, metric, of_outputs=True)


@dataclass(frozen=True)
class Joint:
    """Second moments of a student's inputs x (d_in,) and of its teacher's outputs y (d_out,).

    A student reads what its teacher reads, or inputs that compressed layers have changed.
    """

    rows: float
    input_mean: Tensor  # mu (d_in,)
    output_mean: Tensor  # m (d_out,)
    inputs: Tensor  # S = Cov x (d_in, d_in)
    cross: Tensor  # Cov(y, x) (d_out, d_in)
    outputs: Tensor  # Cov y (d_out, d_out)

    @classmethod
    def of_layer(cls, weight: Tensor, bias: Tensor | None, moments: Moments) -> Joint:
        """Of y = W x + c from the moments of x."""
        W, S = weight.detach().to(moments.mean), moments.covariance
        mean, outputs = _plus(W @ moments.mean, bias), symmetric_product(W @ S, W.T)
        return cls(moments.count, moments.mean, mean, S, W @ S, outputs)

    @classmethod
    def of(cls, joint: Moments, d_in: int) -> Joint:
        """From the moments of the concatenated rows [x, y]."""
        mean, covariance = joint.mean, joint.covariance
        blocks = covariance[:d_in, :d_in], covariance[d_in:, :d_in], covariance[d_in:, d_in:]
        return cls(joint.count, mean[:d_in], mean[d_in:], *blocks)

    def regression(self, toward: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """M (d_out, d_in) = T + (Cov(y, x) - T S)(S + rho)^{-1}, and S + rho; rho from `ridge`.

        The ridge draws M toward T (d_out, d_in), not toward zero: with T = W, directions that the
        rows never show keep the teacher. ridge = inf keeps M = T and needs no inverse.
        """
        T, S = toward.detach().to(self.inputs), self.inputs
        if ridge == math.inf:
            return T, S
        S = S + ridge * S.trace().clamp_min(1e-300) / len(S) * torch.eye(len(S)).to(T)
        return T + torch.linalg.solve(S, (self.cross - T @ self.inputs).T).T, S

    def optimum(
        self,
        toward: Tensor,
        ridge: float = RIDGE,
        metric: Tensor | None = None,
        rank: int | None = None,
    ) -> Optimum:
        """Best students that read x and imitate y; see `regression` for `toward` and `ridge`."""
        M, S = self.regression(toward, ridge)
        return _solve(M, M, S, M @ self.input_mean, self.output_mean, rank, metric)

    def fvu(self, student: LowRankLinear) -> float:
        """FVU of a student fed with x, from the factors as they are stored."""
        A, B = (p.weight.detach().to(self.inputs) for p in (student.A, student.B))
        shift = self.output_mean - _plus(B @ (A @ self.input_mean), student.B.bias)
        explained = 2 * (B * (self.cross @ A.T)).sum() - ((B @ (A @ self.inputs @ A.T)) * B).sum()
        variance = self.outputs.trace()
        mse = variance - explained + shift @ shift
        return float(mse / variance) if variance > 0 else 0.0


def _solve(
    M: Tensor,
    stored: Tensor,
    covariance: Tensor,
    center: Tensor,
    output_mean: Tensor,
    rank: int | None,
    metric: Tensor | None,
    of_outputs: bool = False,
) -> Optimum:
    """Eigenpairs of R M S M^T R^T from S, or `of_outputs` from M S M^T; `stored` is M in its dtype.

    From S where d_out > d_in, they are sought in the range of R M.
    """
    roots = None if metric is None else metric_roots(metric.to(M))
    left = M if roots is None else roots[0] @ M
    Q = None
    if of_outputs:
        K = covariance if roots is None else symmetric_product(roots[0] @ covariance, roots[0].T)
    else:
        if len(M) > M.shape[1]:
            Q, left = torch.linalg.qr(left)
        K = symmetric_product(left @ covariance, left.T)
    found, basis = leading_directions(K, rank or min(M.shape), left)
    rest = max(0.0, float(K.trace() - found.sum())) if len(found) < min(M.shape) else 0.0
    basis = basis if Q is None else Q @ basis
    sides = None if roots is None else (roots[0].T @ basis, roots[1] @ basis)
    return Optimum(stored.detach(), center, output_mean, found, basis, rest, sides)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.detach().to(x)


def leading_directions(covariance: Tensor, count: int, left: Tensor) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of a covariance (m, m) of outputs `left` x, with left (m, d).

    Directions that it leaves open are replaced by the leading ones of left left^T.
    """
    found, basis = leading_eigenpairs(covariance, count)
    known = int((found > NULL * found[0]).sum())
    if known == len(found):
        return found, basis
    U = basis[:, :known]
    rest = left - U @ (U.T @ left)
    # the last term sends U behind all that is left, where `left` itself has few directions
    spread = rest @ rest.T - rest.square().sum() * U @ U.T
    return found, torch.cat([U, leading_eigenpairs(spread, len(found) - known)[1]], 1)


def leading_eigenpairs(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues (count,), descending, not below 0, and vectors (d, count)."""
    d = len(symmetric)
    if symmetric.is_cuda or count > d // 4:
        eigenvalues, basis = torch.linalg.eigh(symmetric)
    else:
        span = (d - count, d - 1)
        found = scipy.linalg.eigh(symmetric.numpy(), subset_by_index=span, driver="evr")
        eigenvalues, basis = map(torch.from_numpy, found)
    return eigenvalues.flip(0)[:count].clamp_min(0), basis.flip(1)[:, :count]


def tails(eigenvalues: Tensor, rest: float = 0.0) -> Tensor:
    """sum_{i>r} lambda_i + rest for r = 0 ... k, of descending eigenvalues (k,)."""
    return torch.cat([eigenvalues.flip(0).cumsum(0).flip(0), eigenvalues.new_zeros(1)]) + rest


def fractions(tails: Tensor) -> Tensor:
    """Losses by rank over that of rank 0; 0 where nothing varies."""
    return tails / tails[0] if tails[0] > 0 else torch.zeros_like(tails)


def floor_fvu(outputs: Tensor, rank: int) -> float:
    """FVU no student with an r-wide bottleneck beats on rows with this Cov y (d_out, d_out)."""
    found, _ = leading_eigenpairs(outputs, min(rank, len(outputs)))
    variance = float(outputs.trace())
    return max(0.0, 1 - float(found.sum()) / variance) if variance > 0 else 0.0


def smallest_rank(fvu_by_rank: Tensor, fvu: float) -> int:
    """Smallest rank >= 1 with FVU at most `fvu`, from the FVU of ranks 0, 1, ..."""
    return max(1, int((fvu_by_rank > fvu).sum()))


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors of `weight` (d_out, d_in) in the Frobenius norm (Eckart, Young 1936).

    Returns A (r, d_in) and B (d_out, r), balanced so that A @ A.T == B.T @ B.

    >>> A, B = truncated_svd(torch.diag(torch.tensor([4.0, 1.0, 0.25])), rank=2)
    >>> (B @ A).diagonal().tolist()
    [4.0, 1.0, 0.0]
    """
    check_rank(rank, min(weight.shape))
    U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def refit_bias(weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mean: Tensor) -> Tensor:
    """The bias that makes a student unbiased on inputs of mean mu: c + (W - B A) mu."""
    shift = weight @ mean - B @ (A @ mean)
    return shift if bias is None else bias + shift
