"""Compress one linear layer, and certify what a student of it lost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.linear import Certificate, LowRankLinear, check_rank
from distil_rank.core.lowrank import (
    Optimum,
    optimum,
    require_finite,
    smallest_rank,
)
from distil_rank.core.moments import Moments
from distil_rank.core.prior import blended_moments, merged
from distil_rank.core.randomness import generator


class Layer(Protocol):
    """What computes W x + c."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


ROWS = 8  # drawn to check a layer's own forward
ROUNDINGS = 8  # of each product that it may differ by


def compress_linear(
    teacher: nn.Linear,
    moments: Moments | Sequence[Moments],
    rank: int | None = None,
    fvu: float | None = None,
    held_out: Moments | None = None,
    prior: Moments | Literal["own"] | None = None,
) -> tuple[LowRankLinear, Certificate]:
    """Best student of `teacher` at `rank`, or at the smallest rank whose FVU is at most `fvu`.

    The student has the teacher's dtype, device and mode, and is frozen where the teacher is. A
    teacher without bias gets one: it is free and carries the mean.

    prior: moments of other inputs, or "own", the layer's (inputs equally likely in all directions),
    to blend in where cross-validation says that it helps (`core.prior`). It needs moments in folds:
    `folds_of(x)`. Few rows gain, and the certificate stays that of the rows.

    >>> x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    >>> layer = torch.nn.Linear(16, 8)
    >>> student, certificate = compress_linear(layer, Moments.of(x), rank=4)
    >>> student.rank, certificate.gap < 1e-6
    (4, True)
    """
    folds = [moments] if isinstance(moments, Moments) else list(moments)
    moments = merged(folds)
    require_linear(teacher, moments)
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
    used, fitted = solution, moments
    if prior is not None:
        if len(folds) < 2:
            raise InputError("moments in folds required beside a prior, got one; see folds_of")
        other = None if isinstance(prior, str) else prior
        fitted, blend = blended_moments(teacher.weight, "input", folds, other, rank)
        if blend.weight or blend.mean_weight:
            used = optimum(teacher.weight, teacher.bias, fitted, rank)
    student = used.student(rank)
    student.inner_mean = student.A.weight.detach() @ fitted.mean
    student.to(teacher.weight).train(teacher.training)
    student.requires_grad_(teacher.weight.requires_grad)
    return student, certify(teacher, student, moments, held_out, solution)


def certify(
    teacher: nn.Linear,
    student: LowRankLinear,
    moments: Moments,
    held_out: Moments | None = None,
    solution: Optimum | None = None,
) -> Certificate:
    """Certificate of any student of `teacher`, measured on its stored factors.

    `solution` on `moments` saves time. InputError where the teacher is more than y = W x + c, or a
    factor of the student is not finite.
    """
    require_linear(teacher, moments)
    require_finite(student)
    rank = student.rank
    solution = solution or optimum(teacher.weight, teacher.bias, moments, rank)
    fields = {}
    if held_out is not None:
        floor = optimum(teacher.weight, teacher.bias, held_out, rank)
        fields = {
            "held_out_rows": held_out.count,
            "held_out_achieved_fvu": student_fvu(teacher, student, held_out),
            "held_out_floor_fvu": float(floor.fvu[rank]),
        }
    achieved = student_fvu(teacher, student, moments)
    return Certificate(rank, moments.count, achieved, float(solution.fvu[rank]), **fields)


def student_fvu(
    teacher: Layer, student: Layer, moments: Moments, metric: Tensor | None = None
) -> float:
    """FVU of a student on the rows behind `moments`, in a metric G (d_out, d_out) of the output.

    Unlike `Joint.fvu` nothing cancels.
    """
    parts = (student.B, student.A) if isinstance(student, LowRankLinear) else (student,)
    W, *factors = (layer.weight.detach().to(moments.mean) for layer in (teacher, *parts))
    error, covariance = W - reduce(torch.matmul, factors), moments.covariance
    shift = error @ moments.mean
    for layer, sign in ((teacher, 1), (student, -1)):
        if layer.bias is not None:
            shift = shift + sign * layer.bias.detach().to(shift)

    def measured(x: Tensor) -> Tensor:
        return x if metric is None else metric.to(x) @ x

    mse = float(((error @ covariance) * measured(error)).sum() + shift @ measured(shift))
    variance = float(((W @ covariance) * measured(W)).sum())
    return mse / variance if variance > 0 else 0.0


def require_linear(layer: nn.Module, moments: Moments) -> None:
    """InputError unless the module computes W x + c on rows like those behind `moments`.

    Refused are modules that only look like a layer (GPT-2's Conv1D stores W transposed), subclasses
    with a forward of their own, and whatever hooks or replaced methods do to the output.
    """
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise InputError(
            "an nn.Linear with nn.Linear's own forward required, got"
            f" {type(layer).__name__}; copy its weight (d_out, d_in) and bias into an nn.Linear"
        )
    if moments.dim != layer.in_features:
        raise InputError(
            f"moments of {layer.in_features} features required for this layer, got {moments.dim}"
        )
    spread = moments.covariance.diagonal().sqrt().cpu()
    noise = torch.randn(ROWS, moments.dim, generator=generator(0, "rows"), dtype=torch.float64)
    x = (moments.mean.cpu() + spread * noise).to(layer.weight)
    with torch.no_grad():
        found = layer(x)  # before the weight is read: a hook may recompute it
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        if found.shape != expected.shape or not _close(found, expected, layer, x):
            raise InputError(
                "a layer with the output W x + c required, got another output:"
                " hooks or a replaced forward change it; remove them"
            )


def _close(found: Tensor, expected: Tensor, layer: nn.Linear, x: Tensor) -> bool:
    scale = x.abs().double() @ layer.weight.abs().double().T
    if layer.bias is not None:
        scale = scale + layer.bias.abs().double()
    allowed = ROUNDINGS * torch.finfo(found.dtype).eps * scale
    return bool(((found.double() - expected.double()).abs() <= allowed).all())
