"""Compress one linear layer, and certify what a student of it lost."""

from __future__ import annotations

from torch import nn

from distil_rank.core.linear import Certificate, LowRankLinear, check_rank
from distil_rank.core.lowrank import Optimum, optimum, refit_bias, smallest_rank
from distil_rank.core.moments import Moments


def compress_linear(
    teacher: nn.Linear,
    moments: Moments,
    rank: int | None = None,
    fvu: float | None = None,
    held_out: Moments | None = None,
) -> tuple[LowRankLinear, Certificate]:
    """Best student of `teacher` at `rank`, or at the smallest rank whose FVU is at most `fvu`.

    The student has the teacher's dtype and device. A teacher without bias gets one: it is free and
    carries the mean.

    >>> x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    >>> layer = torch.nn.Linear(16, 8)
    >>> student, certificate = compress_linear(layer, Moments.of(x), rank=4)
    >>> student.rank, certificate.gap < 1e-6
    (4, True)
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
    """Certificate of any student of `teacher`, measured on its stored factors.

    `solution` on `moments` saves time.
    """
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


def student_fvu(
    teacher: nn.Linear, student: LowRankLinear, moments: Moments, variance: float | None = None
) -> float:
    """FVU of a student on the rows behind `moments`; unlike `Joint.fvu` nothing cancels."""
    W, A, B = (
        p.detach().to(moments.mean) for p in (teacher.weight, student.A.weight, student.B.weight)
    )
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
