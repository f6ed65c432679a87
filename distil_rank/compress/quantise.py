"""Low-rank factors in eight bits: one symmetric scale per row, rounding errors passed on, B refitted to the rounded A.

Columns are rounded one after the other and each error is made good by the columns not yet rounded, as far as the inputs'
second moments allow (Frantar et al., GPTQ, ICLR 2023). A random rotation of the r inner features, free because it is absorbed in
both factors, first spreads the eigenvalues over them: without it the inner features are uncorrelated and nothing could be
passed on (Chee et al., QuIP, NeurIPS 2023). Nearly all of the error is B's: where the spectrum is steep, moving a little of the
features' scale into B before the rotation more than halves it. The bias is refitted last and stays in floating point.

Weights are eight bits in memory and on disk; products run in the input's dtype (weight-only quantisation), on any device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.compress.calibration import MEMORY, Mask, collect
from distil_rank.core.lowrank import LowRankLinear
from distil_rank.compress.sites import Batch, Site, evaluating, trace
from distil_rank.core.lowrank import Drift
from distil_rank.core.randomness import generator

LEVELS = 127
BALANCE = 0.1  # power of an inner feature's variance that moves from A to B before the rotation (measured: 0 to 0.25)
DAMPING = 1e-6  # of the mean second moment, added to all: keeps the Cholesky factor finite


class Int8LowRank(nn.Module):
    """y = B (A x) + bias with int8 A (r, d_in), B (d_out, r) and one scale a row; inference only."""

    A: Tensor
    B: Tensor
    A_scale: Tensor
    B_scale: Tensor

    def __init__(self, A: Tensor, A_scale: Tensor, B: Tensor, B_scale: Tensor, bias: Tensor | None):
        super().__init__()
        for name, tensor in (("A", A), ("A_scale", A_scale), ("B", B), ("B_scale", B_scale)):
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def empty(cls, d_in: int, d_out: int, rank: int, bias: bool) -> Int8LowRank:
        """Zeros, to load a state dict into."""
        A, B = torch.zeros(rank, d_in, dtype=torch.int8), torch.zeros(d_out, rank, dtype=torch.int8)
        return cls(A, torch.zeros(rank), B, torch.zeros(d_out), torch.zeros(d_out) if bias else None)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(x, self.A.to(x.dtype)) * self.A_scale.to(x.dtype)
        y = nn.functional.linear(z, self.B.to(x.dtype)) * self.B_scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and bias as numbers (float64)."""
        A, B = self.A.double() * self.A_scale.double()[:, None], self.B.double() * self.B_scale.double()[:, None]
        return A, B, None if self.bias is None else self.bias.double()

    def dequantised(self) -> LowRankLinear:
        """The same function as plain factors (float64)."""
        return LowRankLinear(*self.factors())


def rounded(matrix: Tensor, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Int8 rows and their scales: matrix (m, n) ~ rows * scale[:, None].

    Without moments every entry goes to the nearest step. With the second moments (n, n) of what the matrix is multiplied with,
    E|(matrix - rounded) z|^2 is made small: columns are rounded in order of falling variance, errors passed on.
    """
    scale = (matrix.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LEVELS).float()
    steps = scale.to(matrix)[:, None]
    if moments is None:
        return _nearest(matrix / steps).to(torch.int8), scale
    order = moments.diagonal().argsort(descending=True, stable=True)
    H = moments[order][:, order]
    H = H + DAMPING * H.diagonal().mean().clamp_min(1e-300) * torch.eye(len(H)).to(H)
    passed = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    work = (matrix / steps)[:, order]
    for j in range(len(order)):
        column = _nearest(work[:, j])
        error = (work[:, j] - column) / passed[j, j]
        work[:, j:] -= torch.outer(error, passed[j, j:])
        work[:, j] = column
    integers = torch.empty_like(work)
    integers[:, order] = work
    return integers.to(torch.int8), scale


def _nearest(x: Tensor) -> Tensor:
    return x.round().clamp(-LEVELS, LEVELS)


def imitated(student: LowRankLinear, drift: Drift) -> Drift:
    """The moments behind `drift` with the student's own output as the target: what its eight-bit version has to match."""
    A, B = student.A.weight.detach().to(drift.inputs), student.B.weight.detach().to(drift.inputs)
    cross = B @ (A @ drift.inputs)
    mean = B @ (A @ drift.input_mean)
    if student.B.bias is not None:
        mean = mean + student.B.bias.detach().to(mean)
    return Drift(drift.rows, drift.input_mean, mean, drift.inputs, cross, cross @ (B @ A).T)


def quantise(student: LowRankLinear, drift: Drift) -> Int8LowRank:
    """Eight-bit version of a student that matches the outputs behind `drift` best (see `imitated`)."""
    S = drift.inputs
    A, B = student.A.weight.detach().to(S), student.B.weight.detach().to(S)
    variance = ((A @ S) * A).sum(1).clamp_min(1e-300)
    spread = (variance / variance.mean()) ** BALANCE
    turn = torch.linalg.qr(
        torch.randn(len(A), len(A), generator=generator(0, "int8 rotation"), dtype=torch.float64)
    ).Q.to(S)
    A_int, A_scale = rounded(turn.T @ (A / spread[:, None]), S)
    A_q = A_int.to(S) * A_scale.to(S)[:, None]
    Z = A_q @ S @ A_q.T
    Z = Z + 1e-9 * Z.trace().clamp_min(1e-300) / len(Z) * torch.eye(len(Z)).to(S)
    target = (B * spread) @ turn  # the best B for the rounded A, drawn to this one in directions without variance
    fitted = target + torch.linalg.solve(Z, ((drift.cross - target @ (A_q @ S)) @ A_q.T).T).T
    B_int, B_scale = rounded(fitted, Z)
    B_q = B_int.to(S) * B_scale.to(S)[:, None]
    bias = drift.output_mean - B_q @ (A_q @ drift.input_mean)
    dtype = student.A.weight.dtype if student.A.weight.dtype != torch.float64 else torch.float32
    return Int8LowRank(A_int, A_scale, B_int, B_scale, bias.to(dtype))


@dataclass(frozen=True)
class Int8Certificate:
    """FVU of eight-bit factors, split: fvu = low_rank + quantisation (+ a cross term, 0 at the optimum)."""

    rank: int
    fvu: float
    low_rank: float  # of the floating-point factors
    quantisation: float  # E|student(x) - int8 student(x)|^2 / variance of y
    bytes: int
    float32_bytes: int


def certify_int8(student: LowRankLinear, quantised: Int8LowRank, drift: Drift) -> Int8Certificate:
    """On the rows behind `drift`, from the factors as they are stored."""
    A, B, bias = quantised.factors()
    plain_A, plain_B = student.A.weight.detach().to(A), student.B.weight.detach().to(A)
    difference = B @ A - plain_B @ plain_A
    shift = difference @ drift.input_mean
    if bias is not None and student.B.bias is not None:
        shift = shift + bias - student.B.bias.detach().to(bias)
    variance = float(drift.outputs.trace())  # of the teacher's output
    error = float(((difference @ drift.inputs) * difference).sum() + shift @ shift)
    return Int8Certificate(
        student.rank,
        drift.fvu(quantised.dequantised()),
        drift.fvu(student),
        error / variance if variance > 0 else 0.0,
        module_bytes(quantised),
        4 * sum(p.numel() for p in student.parameters()),
    )


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {t.data_ptr(): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def equal_bytes_curve(
    student_at: Callable[[int], LowRankLinear],
    fitted: Drift,
    measured: Drift,
    d_in: int,
    d_out: int,
    budgets: Sequence[int],
) -> list[dict[str, Any]]:
    """FVU of the best student in float32, bfloat16 and int8 at equal bytes; student_at(rank) gives a float64 student."""
    records: list[dict[str, Any]] = []
    limit = min(d_in, d_out)
    for budget in budgets:
        room = budget - 4 * d_out  # the bias stays float32
        for precision, per_rank in (
            ("float32", 4 * (d_in + d_out)),
            ("bfloat16", 2 * (d_in + d_out)),
            ("int8", d_in + d_out + 4),  # and 4 d_out for the scales of B
        ):
            rank = min(limit, (room - (4 * d_out if precision == "int8" else 0)) // per_rank)
            if rank < 1:
                continue
            student = student_at(rank)
            if precision == "int8":
                fvu = measured.fvu(quantise(student, imitated(student, fitted)).dequantised())
            else:
                dtype = torch.float32 if precision == "float32" else torch.bfloat16
                A, B = student.A.weight.detach().to(dtype), student.B.weight.detach().to(dtype)
                fvu = measured.fvu(LowRankLinear(A.double(), B.double(), student.B.bias.detach().float().double()))
            records.append({"bytes": budget, "precision": precision, "rank": int(rank), "fvu": fvu})
    return records


def quantise_model(
    small: nn.Module, batches: Sequence[Batch], mask: Mask | None = None, memory: int = MEMORY
) -> tuple[nn.Module, dict[str, Int8Certificate]]:
    """Copy of a compressed model with int8 factors, fitted on its own activations; certificates relative to its float factors."""
    names = [name for name, part in small.named_modules() if isinstance(part, LowRankLinear)]
    if not names:
        raise InputError("a model with low-rank layers required for int8, all of them stayed dense; lower the ratio")
    modules = dict(small.named_modules())
    sites = [Site(f"{name}.A", modules[name].A) for name in names]
    batches = list(batches)
    with evaluating(small):
        calls = trace(small, batches[0], sites)
    quantised: dict[str, nn.Module] = {}
    certificates = {}
    for part in collect(small, batches, sites, calls, mask, memory=memory, inputs_only=True):
        for key, statistics in part.items():
            name = key.removesuffix(".A")
            student = cast(LowRankLinear, modules[name])
            weight = student.B.weight.double() @ student.A.weight.double()
            drift = Drift.none(weight, student.B.bias, statistics.moments)
            integers = quantise(student, drift)
            quantised[name] = integers.train(student.training)
            certificates[name] = certify_int8(student, integers, drift)
    return copy.deepcopy(small, {id(modules[name]): module for name, module in quantised.items()}), certificates
