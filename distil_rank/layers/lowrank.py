"""The best low-rank student of a linear layer, in closed form, with its certificate.

Teacher y = W x + c with mu = E x and S = Cov x. Let (lambda_i, u_i) be the eigenpairs of Cov y = W S W^T, descending, and
U = [u_1 ... u_r]. Over all rank-r M and all b,

    min E |y - M x - b|^2 = sum_{i>r} lambda_i,     attained by  B = U,  A = U^T W,  b = c + (I - U U^T) W mu.

(The best b centres the problem; predictions then lie in an r-dimensional subspace, so PCA of y bounds every map, and the
bound is attained because y is affine in x. Reduced-rank regression without noise: Izenman, J. Multivariate Anal. 5, 1975.)
No inverse of S appears, so a singular S (LayerNorm outputs, n < d) needs no ridge.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import scipy.linalg
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distil_rank.statistics.moments import Moments, symmetric_product

SCHEMA = "distil-rank/student/1"


class LowRankLinear(nn.Module):
    """y = B (A x) + bias with A (r, d_in) and B (d_out, r): two plain linear layers."""

    def __init__(self, A: Tensor, B: Tensor, bias: Tensor | None = None):
        super().__init__()
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(f"A (r, d_in) and B (d_out, r) required, got {tuple(A.shape)} and {tuple(B.shape)}")
        rank, d_in = A.shape
        self.A = nn.Linear(d_in, rank, bias=False, device="meta")
        self.B = nn.Linear(rank, len(B), bias=bias is not None, device="meta")
        self.A.weight = nn.Parameter(A.detach().clone(memory_format=torch.contiguous_format))
        self.B.weight = nn.Parameter(B.detach().clone(memory_format=torch.contiguous_format))
        if bias is not None:
            self.B.bias = nn.Parameter(bias.detach().clone())

    @property
    def rank(self) -> int:
        return self.A.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))

    def truncate(self, rank: int) -> LowRankLinear:
        """The student of the first `rank` factors: they are ordered, so it is the rank-`rank` student.

        The bias stays as it is; `Optimum.student` also refits it.
        """
        check_rank(rank, self.rank)
        return LowRankLinear(self.A.weight[:rank].detach(), self.B.weight[:, :rank].detach(), self.B.bias)

    def save(self, path: str | Path, certificate: Certificate | None = None) -> None:
        """Write the factors as safetensors, the certificate as JSON in the header; atomic."""
        temporary = Path(f"{path}.tmp{os.getpid()}")
        metadata = {"schema": SCHEMA, "certificate": json.dumps(certificate and asdict(certificate))}
        try:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> tuple[LowRankLinear, Certificate | None]:
        """Read a student written by `save`, with its certificate."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("schema") != SCHEMA:
                    raise ValueError(f"a file written by LowRankLinear.save required, got {path}")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"a safetensors file of low-rank factors required, got {path}: {error}") from None
        student = LowRankLinear(tensors["A.weight"], tensors["B.weight"], tensors.get("B.bias"))
        fields = json.loads(metadata["certificate"])
        return student, Certificate(**fields) if fields else None


@dataclass(frozen=True)
class Certificate:
    """What a student lost, and what any student of its rank must lose. FVU = MSE / variance of the teacher's output."""

    rank: int
    rows: float  # rows the moments were taken from
    achieved_fvu: float  # of the student as deployed (cast factors), on those rows
    floor_fvu: float  # of the best rank-r student on those rows
    held_out_rows: float | None = None
    held_out_achieved_fvu: float | None = None
    held_out_floor_fvu: float | None = None  # no rank-r student, however trained, is below this on the held-out rows

    @property
    def gap(self) -> float:
        """Achieved minus floor on the fitted rows, in FVU."""
        return self.achieved_fvu - self.floor_fvu


@dataclass(frozen=True)
class Optimum:
    """Closed-form students of every rank up to k from one eigendecomposition (float64); k = d_out unless limited."""

    weight: Tensor  # W (d_out, d_in)
    bias: Tensor  # c (d_out,)
    mean: Tensor  # mu (d_in,)
    variance: float  # trace of Cov y
    eigenvalues: Tensor  # of Cov y, the k largest, descending (k,)
    basis: Tensor  # U (d_out, k), one eigenvector a column

    @property
    def fvu(self) -> Tensor:
        """FVU of the best student of rank 0, 1, ... k on the fitted rows (k + 1,)."""
        return tail_fractions(self.eigenvalues, self.variance if len(self.eigenvalues) < len(self.weight) else None)

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """A (r, d_in), B (d_out, r) and bias (d_out,)."""
        check_rank(rank, min(*self.weight.shape, len(self.eigenvalues)))
        B = self.basis[:, :rank]
        A = B.T @ self.weight
        return A, B, refit_bias(self.weight, self.bias, A, B, self.mean)

    def student(self, rank: int, dtype: torch.dtype = torch.float64) -> LowRankLinear:
        return LowRankLinear(*(t.to(dtype) for t in self.factors(rank)))


def optimum(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int | None = None) -> Optimum:
    """Solve for the best students of y = W x + c of every rank, or faster of those up to `rank`.

    weight (d_out, d_in), bias (d_out,) or None, moments of x (d_in,).
    """
    if weight.shape[1] != moments.dim:
        raise ValueError(f"moments of {weight.shape[1]} features required for this layer, got {moments.dim}")
    W = weight.detach().to(moments.mean)
    c = torch.zeros(len(W)).to(W) if bias is None else bias.detach().to(W)
    covariance = output_covariance(W, moments)
    eigenvalues, basis = leading_eigenpairs(covariance, rank or len(W))
    return Optimum(W, c, moments.mean, float(covariance.trace()), eigenvalues, basis)


def output_covariance(weight: Tensor, moments: Moments) -> Tensor:
    """Cov(W x) = W S W^T (d_out, d_out), float64; only the upper triangle of blocks is computed, then mirrored."""
    W = weight.detach().to(moments.mean)
    return symmetric_product(W @ moments.covariance, W.T)


def leading_eigenpairs(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues (count,), descending and not below 0, with their eigenvectors (d, count)."""
    d = len(symmetric)
    if symmetric.is_cuda or count > d // 4:
        eigenvalues, basis = torch.linalg.eigh(symmetric)
    else:
        found = scipy.linalg.eigh(symmetric.numpy(), subset_by_index=(d - count, d - 1), driver="evr")
        eigenvalues, basis = map(torch.from_numpy, found)
    return eigenvalues.flip(0)[:count].clamp_min(0), basis.flip(1)[:, :count]


def compress_linear(
    teacher: nn.Linear,
    moments: Moments,
    rank: int | None = None,
    fvu: float | None = None,
    held_out: Moments | None = None,
) -> tuple[LowRankLinear, Certificate]:
    """Best student of `teacher` at `rank`, or at the smallest rank whose FVU is at most `fvu`, and its certificate.

    The student has the teacher's dtype and device. A teacher without bias gets one: it is free and carries the mean.
    """
    if (rank is None) == (fvu is None):
        raise ValueError(f"exactly one of rank and fvu is required, got rank={rank}, fvu={fvu}")
    limit = min(teacher.weight.shape)
    if rank is not None:
        check_rank(rank, limit)
        solution = optimum(teacher.weight, teacher.bias, moments, rank)
    else:
        assert fvu is not None
        if not 0 <= fvu < 1:
            raise ValueError(f"fvu must be in [0, 1), got fvu={fvu}")
        solution = optimum(teacher.weight, teacher.bias, moments)
        rank = min(smallest_rank(solution.fvu, fvu), limit)
    student = solution.student(rank).to(teacher.weight)
    return student, certify(teacher, student, moments, held_out, solution)


def certify(
    teacher: nn.Linear,
    student: LowRankLinear,
    moments: Moments,
    held_out: Moments | None = None,
    solution: Optimum | None = None,
) -> Certificate:
    """Certificate of any student of `teacher`, measured on its stored factors; `solution` on `moments` saves time."""
    rank = student.rank
    solution = solution or optimum(teacher.weight, teacher.bias, moments, rank)
    fields = {}
    if held_out is not None:
        floor = optimum(teacher.weight, teacher.bias, held_out, rank)
        fields = {
            "held_out_rows": held_out.count,
            "held_out_achieved_fvu": student_fvu(teacher, student, held_out, floor.variance),
            "held_out_floor_fvu": float(floor.fvu[rank]),
        }
    achieved = student_fvu(teacher, student, moments, solution.variance)
    return Certificate(rank, moments.count, achieved, float(solution.fvu[rank]), **fields)


def student_fvu(teacher: nn.Linear, student: LowRankLinear, moments: Moments, variance: float | None = None) -> float:
    """FVU of a low-rank student on the rows behind `moments`, from the factors as they are stored."""
    W, A, B = (p.detach().to(moments.mean) for p in (teacher.weight, student.A.weight, student.B.weight))
    bias = None if teacher.bias is None else teacher.bias.detach()
    shift = refit_bias(W, bias, A, B, moments.mean)  # the unbiased bias, in float64
    if student.B.bias is not None:
        shift = shift - student.B.bias.detach()
    covariance = moments.covariance
    error = W - B @ A
    mse = float(((error @ covariance) * error).sum() + shift @ shift)
    if variance is None:
        variance = float(((W @ covariance) * W).sum())
    return mse / variance if variance > 0 else 0.0


def tail_fractions(eigenvalues: Tensor, variance: float | None = None) -> Tensor:
    """sum_{i>r} lambda_i / variance for r = 0 ... k, from the k largest eigenvalues, descending (k,).

    `variance` is the sum of all eigenvalues where more than these k exist.
    """
    rest = 0.0 if variance is None else max(0.0, variance - float(eigenvalues.sum()))
    tails = torch.cat([eigenvalues.flip(0).cumsum(0).flip(0), eigenvalues.new_zeros(1)]) + rest
    return tails / tails[0] if tails[0] > 0 else torch.zeros_like(tails)


def smallest_rank(fvu_by_rank: Tensor, fvu: float) -> int:
    """Smallest rank >= 1 with FVU at most `fvu`, from the FVU of ranks 0, 1, ..."""
    return max(1, int((fvu_by_rank > fvu).sum()))


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors of `weight` (d_out, d_in) in the Frobenius norm: weight ~ B @ A (Eckart and Young, 1936).

    Returns A (r, d_in) and B (d_out, r), balanced so that A @ A.T == B.T @ B.
    """
    check_rank(rank, min(weight.shape))
    U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def refit_bias(weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mean: Tensor) -> Tensor:
    """The bias that makes a student unbiased on inputs of mean mu: c + (W - B A) mu."""
    shift = weight @ mean - B @ (A @ mean)
    return shift if bias is None else bias + shift


def check_rank(rank: int, limit: int) -> None:
    if not 1 <= rank <= limit:
        raise ValueError(f"rank must be between 1 and min(d_out, d_in)={limit}, got rank={rank}")
