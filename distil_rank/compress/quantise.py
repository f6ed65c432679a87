"""Low-rank factors in eight bits: one symmetric scale a row, rounding errors passed on, B refitted.

Columns are rounded one after the other and each error is made good by the columns not yet rounded,
as far as the inputs' second moments allow (Frantar et al., GPTQ, ICLR 2023). A random rotation of
the r inner features, free because both factors absorb it, first spreads the eigenvalues over them:
without it the inner features are uncorrelated and no error could be passed on (Chee et al., QuIP,
NeurIPS 2023). Nearly all of the error is B's: where the spectrum is steep, moving a little of the
features' scale into B before the rotation more than halves it. The bias is refitted last and stays
in floating point.

Weights are eight bits in memory and on disk; products run in the input's dtype (weight-only
quantization), on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import Joint
from distil_rank.core.randomness import generator

LEVELS = 127
BALANCE = 0.1  # power of an inner feature's variance moved from A to B (measured: 0 to 0.25)
DAMPING = 1e-6  # of the mean second moment, added to all: keeps the Cholesky factor finite


class Int8LowRank(nn.Module):
    """y = B (A x) + bias with int8 A (r, d_in), B (d_out, r), one scale a row; inference only."""

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
        A, B = (torch.zeros(*shape, dtype=torch.int8) for shape in ((rank, d_in), (d_out, rank)))
        scales = torch.zeros(rank), torch.zeros(d_out)
        return cls(A, scales[0], B, scales[1], torch.zeros(d_out) if bias else None)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(x, self.A.to(x.dtype)) * self.A_scale.to(x.dtype)
        y = nn.functional.linear(z, self.B.to(x.dtype)) * self.B_scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and bias as numbers (float64)."""
        A, B = _numbers(self.A, self.A_scale), _numbers(self.B, self.B_scale)
        return A, B, None if self.bias is None else self.bias.double()

    def dequantised(self) -> LowRankLinear:
        """The same function as plain factors (float64)."""
        return LowRankLinear(*self.factors())


def _numbers(integers: Tensor, scale: Tensor) -> Tensor:
    return integers.double() * scale.double()[:, None]


def rounded(matrix: Tensor, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Int8 rows and their scales: matrix (m, n) ~ rows * scale[:, None].

    Without moments every entry goes to the nearest step. With the second moments (n, n) of what the
    matrix is multiplied with, E|(matrix - rounded) z|^2 is made small: columns are rounded in order
    of falling variance, errors passed on.
    """
    tiny = torch.finfo(torch.float32).tiny
    scale = (matrix.abs().amax(1).clamp_min(tiny) / LEVELS).float()
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


def imitated(student: LowRankLinear, joint: Joint) -> Joint:
    """The inputs of `joint` with the student's own output: what eight bits have to match."""
    A, B = (p.weight.detach().to(joint.inputs) for p in (student.A, student.B))
    cross = B @ (A @ joint.inputs)
    mean = B @ (A @ joint.input_mean)
    if student.B.bias is not None:
        mean = mean + student.B.bias.detach().to(mean)
    outputs = cross @ (B @ A).T
    return Joint(joint.rows, joint.input_mean, mean, joint.inputs, cross, outputs)


def quantise(student: LowRankLinear, joint: Joint) -> Int8LowRank:
    """Eight-bit version of a student that matches the outputs of `joint` best (see `imitated`)."""
    S = joint.inputs
    A, B = (p.weight.detach().to(S) for p in (student.A, student.B))
    variance = ((A @ S) * A).sum(1).clamp_min(1e-300)
    spread = (variance / variance.mean()) ** BALANCE
    source = generator(0, "int8 rotation")
    turn = torch.randn(len(A), len(A), generator=source, dtype=torch.float64)
    turn = torch.linalg.qr(turn).Q.to(S)
    A_int, A_scale = rounded(turn.T @ (A / spread[:, None]), S)
    A_q = _numbers(A_int, A_scale)
    Z = A_q @ S @ A_q.T
    Z = Z + 1e-9 * Z.trace().clamp_min(1e-300) / len(Z) * torch.eye(len(Z)).to(S)
    # the best B for the rounded A, drawn to this one in directions without variance
    target = (B * spread) @ turn
    fitted = target + torch.linalg.solve(Z, ((joint.cross - target @ (A_q @ S)) @ A_q.T).T).T
    B_int, B_scale = rounded(fitted, Z)
    bias = joint.output_mean - _numbers(B_int, B_scale) @ (A_q @ joint.input_mean)
    dtype = student.A.weight.dtype if student.A.weight.dtype != torch.float64 else torch.float32
    return Int8LowRank(A_int, A_scale, B_int, B_scale, bias.to(dtype))


@dataclass(frozen=True)
class Int8Certificate:
    """fvu = low_rank + quantisation (+ a cross term, 0 at the optimum)."""

    rank: int
    fvu: float
    low_rank: float  # of the floating-point factors
    quantisation: float  # E|student(x) - int8 student(x)|^2 / variance of y
    bytes: int
    float32_bytes: int


def certify_int8(student: LowRankLinear, quantised: Int8LowRank, joint: Joint) -> Int8Certificate:
    """On the rows behind `joint`, from the factors as they are stored."""
    A, B, bias = quantised.factors()
    difference = B @ A - student.B.weight.detach().to(A) @ student.A.weight.detach().to(A)
    shift = difference @ joint.input_mean
    if bias is not None and student.B.bias is not None:
        shift = shift + bias - student.B.bias.detach().to(bias)
    error = float(((difference @ joint.inputs) * difference).sum() + shift @ shift)
    variance = float(joint.outputs.trace())  # of the teacher's output
    return Int8Certificate(
        student.rank,
        joint.fvu(quantised.dequantised()),
        joint.fvu(student),
        error / variance if variance > 0 else 0.0,
        module_bytes(quantised),
        4 * sum(p.numel() for p in student.parameters()),
    )


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {t.data_ptr(): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@dataclass(frozen=True)
class Choice:
    """A precision, the rank it can afford and its loss."""

    bytes: int
    precision: str
    rank: int
    fvu: float


def at_equal_bytes(
    student_at: Callable[[int], LowRankLinear], fitted: Joint, measured: Joint, size: int
) -> list[Choice]:
    """The best students in float32, bfloat16 and int8 that take `size` bytes, the bias in float32.

    student_at(rank) gives a float64 student; int8 is fitted on `fitted`, all are measured.
    """
    d_out, d_in = fitted.cross.shape
    choices = []
    for precision, width, fixed in (("float32", 4, 0), ("bfloat16", 2, 0), ("int8", 1, 4)):
        per_rank = width * (d_in + d_out) + fixed  # int8 has a scale for each row of A, and of B
        rank = min(d_in, d_out, (size - (4 + fixed) * d_out) // per_rank)
        if rank < 1:
            continue
        student = student_at(rank)
        if precision == "int8":
            stored = quantise(student, imitated(student, fitted)).dequantised()
        else:
            dtype = getattr(torch, precision)
            A, B = (p.weight.detach().to(dtype).double() for p in (student.A, student.B))
            stored = LowRankLinear(A, B, student.B.bias.detach().float().double())
        choices.append(Choice(size, precision, rank, measured.fvu(stored)))
    return choices
