"""Linear layers in eight or four bits: symmetric scales, rounding errors passed on.

Columns are rounded one after the other and each error is made good by the columns not yet rounded,
as far as the inputs' second moments allow (Frantar et al., GPTQ, ICLR 2023). The two factors of one
low-rank layer are made together (`quantise`). A random rotation of the r inner features, free
because both absorb it, first spreads the eigenvalues over them: without it the inner features are
uncorrelated and no error could be passed on (Chee et al., QuIP, NeurIPS 2023). Nearly all of the
error is B's, which is refitted: where the spectrum is steep, moving a little of the features' scale
into B before the rotation more than halves it. The bias is refitted last and stays in floating
point.

Weights are small in memory and on disk; products run in the input's dtype, or on integer kernels
(`on_integers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.compress.calibration import MEMORY, collect
from distil_rank.compress.sites import Batch, find_sites, replaced, trace
from distil_rank.core.errors import InputError
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import Joint
from distil_rank.core.randomness import generator
from distil_rank.proteins.compressed import GROUP, unpacked

BALANCE = 0.1  # power of an inner feature's variance moved from A to B (measured: 0 to 0.25)
TINY = torch.finfo(torch.float32).tiny
SMALLEST = 1e-30  # step in four bits: that of a group of zeros
DAMPING = 1e-6  # of the mean second moment, added to all: keeps the Cholesky factor finite


def rounded(
    matrix: Tensor, moments: Tensor | None = None, bits: int = 8, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """Whole rows (int8) and their scales: matrix (m, n) ~ rows * scale, one scale a row (m,).

    Without moments every entry goes to the nearest step. With the second moments (n, n) of what the
    matrix is multiplied with, E|(matrix - rounded) z|^2 is made small: columns are rounded in order
    of falling variance, errors passed on. group: one scale (m, n / group) for so many columns of a
    row; of several shrunken ones the best, because few bits gain more from finer steps.
    """
    n = matrix.shape[1]
    levels = 2 ** (bits - 1) - 1
    weight = torch.ones(n).to(matrix) if moments is None else moments.diagonal()
    parts = zip(matrix.split(group or n, 1), weight.split(group or n))
    scale = torch.stack([_scale(x, w, levels, group is not None) for x, w in parts], 1)
    scale = scale.clamp_min(TINY).float()
    steps = scale.repeat_interleave(group or n, 1)[:, :n].to(matrix)
    scale = scale[:, 0] if group is None else scale
    if moments is None:
        return _nearest(matrix / steps, levels).to(torch.int8), scale
    order = moments.diagonal().argsort(descending=True, stable=True)
    H = moments[order][:, order]
    H = H + DAMPING * H.diagonal().mean().clamp_min(1e-300) * torch.eye(len(H)).to(H)
    passed = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    work, steps = matrix[:, order], steps[:, order]
    for j in range(len(order)):
        column = _nearest(work[:, j] / steps[:, j], levels)
        error = (work[:, j] - column * steps[:, j]) / passed[j, j]
        work[:, j:] -= torch.outer(error, passed[j, j:])
        work[:, j] = column
    integers = torch.empty_like(work)
    integers[:, order] = work
    return integers.to(torch.int8), scale


def _scale(x: Tensor, weight: Tensor, levels: int, search: bool) -> Tensor:
    """Step (m,) for the rows of x (m, k), columns weighted: to the largest entry, or the best."""
    largest = x.abs().amax(1) / levels
    if not search:
        return largest
    steps = largest.clamp_min(SMALLEST) * torch.linspace(0.5, 1, 26).to(x)[:, None]
    found = _nearest(x / steps[..., None], levels) * steps[..., None]
    errors = ((found - x).square() * weight).sum(-1)
    return steps.gather(0, errors.argmin(0)[None])[0]


def _nearest(x: Tensor, levels: int) -> Tensor:
    return x.round().clamp(-levels, levels)


class QuantLinear(nn.Module):
    """y = W x + bias with W (d_out, d_in) in 8 bits, or in 4 (two to a byte); inference only.

    A scale a row, or a row and GROUP columns (float16 where that holds them all). Weights are small
    in memory and on disk; products run in the input's dtype. With `integer`, which whole models
    have (`on_integers`), eight bits multiply eight bits on a CPU: each row of a float32 input is
    rounded to its own scale, where no gradient is asked for.
    """

    packed: Tensor
    scale: Tensor
    integer = False

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None, d_in: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, len(packed)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(
        cls, W: Tensor, bias: Tensor | None, moments: Tensor | None = None, bits: int = 8
    ) -> QuantLinear:
        """The layer fitted to inputs with these second moments (d_in, d_in), or to none."""
        W = W.detach() if moments is None else W.detach().to(moments)
        integers, scale = rounded(W, moments, bits, None if bits == 8 else GROUP)
        if bits == 4:
            integers = nn.functional.pad(integers + 8, (0, W.shape[1] % 2)).to(torch.uint8)
            integers = integers[:, ::2] + 16 * integers[:, 1::2]
            half = scale.half()
            held = (half.float() - scale).abs() <= scale / 1024
            scale = half if bool((held | (scale <= SMALLEST)).all()) else scale
        return cls(integers, scale, bias, W.shape[1])

    @classmethod
    def empty(cls, d_in: int, d_out: int, bits: int, bias: bool) -> QuantLinear:
        """Zeros, to load a state dict into."""
        packed, scale = torch.zeros(d_out, d_in, dtype=torch.int8), torch.zeros(d_out)
        if bits == 4:
            packed = torch.zeros(d_out, -(-d_in // 2), dtype=torch.uint8)
            scale = torch.zeros(d_out, -(-d_in // GROUP), dtype=torch.float16)
        return cls(packed, scale, torch.zeros(d_out) if bias else None, d_in)

    @property
    def bits(self) -> int:
        return 8 if self.packed.dtype == torch.int8 else 4

    @property
    def weight(self) -> Tensor:
        """W (d_out, d_in) as numbers, float32."""
        return self.numbers(torch.float32)

    def numbers(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return unpacked(self.packed, self.scale, self.in_features, dtype)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        plain = input.is_cpu and input.dtype == torch.float32 and not input.requires_grad
        exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
        eight = self.integer and self.bits == 8 and self.in_features > 1  # of one, torch is wrong
        if exported or not (plain and eight and integers_are_exact()):
            return nn.functional.linear(input, self.numbers(input.dtype), bias)
        rows = input.reshape(-1, self.in_features)
        step = rows.abs().amax(1, keepdim=True).clamp_min(TINY) / 127
        product = torch._int_mm((rows / step).round_().to(torch.int8), self.packed.T)
        found = product.float().mul_(step).mul_(self.scale)
        found = found if bias is None else found.add_(bias)
        return found.reshape(*input.shape[:-1], self.out_features)


def on_integers(model: nn.Module, on: bool = True) -> nn.Module:
    """The model, whose eight-bit layers now multiply on the CPU's integer kernels, or not."""
    for part in model.modules():
        if isinstance(part, QuantLinear):
            part.integer = on
    return model


@cache
def integers_are_exact() -> bool:
    """Whether this processor's eight-bit products are: without VNNI instructions some saturate."""
    worst = torch.full((4, 64), 127, dtype=torch.int8)
    return torch.equal(torch._int_mm(worst, -worst.T), torch.full((4, 4), -64 * 127**2).int())


def quantise_model(
    model: nn.Module, batches: Sequence[Batch], bits: int, memory: int = MEMORY
) -> tuple[nn.Module, dict[str, float]]:
    """Copy of a model, dense or compressed, with all its linear layers in 8 or 4 bits.

    Layers are fitted to the model's own activations. Returns by layer the squared error of its
    output over the output's second moment.
    """
    if bits not in (4, 8):
        raise InputError(f"8 or 4 bits required, got {bits}")
    made: dict[str, QuantLinear] = {}
    errors = {}
    sites = trace(model, batches, find_sites(model))
    for statistics in collect(model, batches, sites, memory=memory, inputs_only=True):
        moments = statistics.moments
        second = moments.covariance + moments.mean.outer(moments.mean)
        for site in statistics.sites:
            new = QuantLinear.of(site.weight, site.bias, second, bits)
            W = site.weight.to(second)
            lost, whole = ((x * (x @ second)).sum() for x in (new.weight.to(second) - W, W))
            errors[site.name] = float(lost / whole.clamp_min(1e-300))
            made[site.name] = new.train(site.module.training)
    return on_integers(replaced(model, made)), errors


def quantise(student: LowRankLinear, mean: Tensor, S: Tensor) -> LowRankLinear:
    """Eight-bit version that matches the student best on inputs of this mean and covariance S."""
    A, B = (p.weight.detach().to(S) for p in (student.A, student.B))
    variance = ((A @ S) * A).sum(1).clamp_min(1e-300)
    spread = (variance / variance.mean()) ** BALANCE
    source = generator(0, "int8 rotation")
    turn = torch.randn(len(A), len(A), generator=source, dtype=torch.float64)
    turn = torch.linalg.qr(turn).Q.to(S)
    rows = QuantLinear.of(turn.T @ (A / spread[:, None]), None, S)
    A_q = rows.numbers().to(S)
    Z = A_q @ S @ A_q.T
    Z = Z + 1e-9 * Z.trace().clamp_min(1e-300) / len(Z) * torch.eye(len(Z)).to(S)
    # the best B for the rounded A, drawn to this one in directions without variance
    target = (B * spread) @ turn
    cross = B @ (A @ S)
    fitted = target + torch.linalg.solve(Z, ((cross - target @ (A_q @ S)) @ A_q.T).T).T
    found = QuantLinear.of(fitted, None, Z)
    bias = B @ (A @ mean)
    bias = bias if student.B.bias is None else bias + student.B.bias.detach().to(bias)
    bias = bias - found.numbers().to(S) @ (A_q @ mean)
    dtype = student.A.weight.dtype if student.A.weight.dtype != torch.float64 else torch.float32
    found.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return in_place(rows, found)


def in_place(A: QuantLinear, B: QuantLinear) -> LowRankLinear:
    """The low-rank layer with these factors."""
    student = LowRankLinear(A.weight, B.weight)
    student.set_submodule("A", A)
    student.set_submodule("B", B)
    return student


def dequantised(student: LowRankLinear) -> LowRankLinear:
    """The same function as plain factors (float64)."""
    parts: Any = (student.A, student.B)
    A, B = (part.numbers() for part in parts)
    return LowRankLinear(A, B, None if student.bias is None else student.bias.double())


@dataclass(frozen=True)
class Int8Certificate:
    """fvu = low_rank + quantisation (+ a cross term, 0 at the optimum)."""

    rank: int
    fvu: float
    low_rank: float  # of the floating-point factors
    quantisation: float  # E|student(x) - int8 student(x)|^2 / variance of y
    bytes: int
    float32_bytes: int


def certify_int8(student: LowRankLinear, quantised: LowRankLinear, joint: Joint) -> Int8Certificate:
    """On the rows behind `joint`, from the factors as they are stored."""
    plain = dequantised(quantised)
    A, B = plain.A.weight, plain.B.weight
    difference = (B @ A - student.B.weight.to(A) @ student.A.weight.to(A)).detach()
    shift = difference @ joint.input_mean
    if plain.bias is not None and student.bias is not None:
        shift = shift + (plain.bias - student.bias.to(A)).detach()
    error = float(((difference @ joint.inputs) * difference).sum() + shift @ shift)
    variance = float(joint.outputs.trace())  # of the teacher's output
    return Int8Certificate(
        student.rank,
        joint.fvu(plain),
        joint.fvu(student),
        error / variance if variance > 0 else 0.0,
        module_bytes(quantised),
        4 * sum(p.numel() for p in student.parameters()),
    )


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {t.data_ptr(): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
