"""What a compressed layer or head lost, as JSON records: achieved and floor FVU, rank curve, intervals, equal bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.core.lowrank import LowRankLinear, leading_eigenpairs
from distil_rank.compress.quantise import Int8LowRank, equal_bytes_curve
from distil_rank.core.lowrank import Drift, Spectrum
from distil_rank.core.randomness import generator
from distil_rank.core.records import interval
from distil_rank.core.intervals import bootstrap_counts, percentile_interval

DRAWS = 1000
CURVE_POINTS = 40


def layer_certificate(
    teacher: nn.Linear, student: nn.Module, spectrum: Spectrum, drift: Drift, held: Drift | None
) -> dict[str, Any]:
    """Achieved and floor FVU on both row sets, and the curve over ranks."""
    measured = student.dequantised() if isinstance(student, Int8LowRank) else student
    assert isinstance(measured, LowRankLinear)
    rank, d_in, d_out = measured.rank, teacher.in_features, teacher.out_features
    record: dict[str, Any] = {
        "achieved_fvu": drift.fvu(measured),
        "floor_fvu": floor_fvu(drift.outputs, rank),
        "parameters_before": d_in * d_out,
        "parameters_after": rank * (d_in + d_out),
    }
    if held is not None:
        record |= {"held_out_achieved_fvu": held.fvu(measured), "held_out_floor_fvu": floor_fvu(held.outputs, rank)}
    return record | {"rank_curve": rank_curve(teacher, spectrum, held)}


def floor_fvu(outputs: Tensor, rank: int) -> float:
    """FVU that no rank-r student, whatever it reads, can beat on rows with this Cov y."""
    variance = float(outputs.trace())
    kept = float(leading_eigenpairs(outputs, min(rank, len(outputs)))[0].sum())
    return max(0.0, 1 - kept / variance) if variance > 0 else 0.0


def rank_curve(teacher: nn.Linear, spectrum: Spectrum, held: Drift | None) -> dict[str, list]:
    """FVU by rank, thinned: on the fitted rows, and on held-out ones that of the same students beside the floor there."""
    limit = len(spectrum.eigenvalues)
    ranks = sorted({round(limit ** (k / CURVE_POINTS)) for k in range(CURVE_POINTS + 1)})
    curve: dict[str, list] = {"rank": ranks, "fvu": [spectrum.fvu(r) for r in ranks]}
    if held is not None and float(held.outputs.trace()) > 0:
        variance, U = float(held.outputs.trace()), spectrum.basis
        shift = held.output_mean - spectrum.centre
        if teacher.bias is not None:
            shift = shift - teacher.bias.detach().to(shift)
        explained = ((held.outputs @ U) * U).sum(0) + (U.T @ shift).square()
        missed = variance + float(shift @ shift) - explained.cumsum(0)
        floors = leading_eigenpairs(held.outputs, limit)[0].cumsum(0)
        curve["held_out_fvu"] = [max(0.0, float(missed[r - 1]) / variance) for r in ranks]
        curve["held_out_floor_fvu"] = [max(0.0, 1 - float(floors[r - 1]) / variance) for r in ranks]
    return curve


def equal_bytes(part: nn.Linear, spectrum: Spectrum, fitted: Drift, measured: Drift, size: int) -> dict[str, Any]:
    """The best rank and precision that take the same bytes as the chosen student."""

    def student(rank: int) -> LowRankLinear:
        return spectrum.student(part.weight.double(), part.bias, rank)

    choices = equal_bytes_curve(student, fitted, measured, part.in_features, part.out_features, [size])
    return {"bytes": size, "choices": choices, "best": min(choices, key=lambda c: c["fvu"]) if choices else None}


def row_squares(y: Tensor, other: Tensor) -> Tensor:
    """Per row (n, 2): squared error, squared deviation of y from its mean."""
    y = y.double()
    return torch.stack([(other.double() - y).square().sum(1), (y - y.mean(0)).square().sum(1)], 1)


def fvu_interval(rows: Tensor, seed: int) -> dict[str, Any]:
    """FVU with its 95 % interval over rows (bootstrap)."""

    def fvu(sums: Tensor) -> Tensor:
        return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1].clamp_min(1e-300), 0.0)

    counts = bootstrap_counts(len(rows), DRAWS, generator(seed, "bootstrap over rows"))
    return interval(float(fvu(rows.sum(0))), *percentile_interval(fvu(counts @ rows)), False)


def output_fvu(head: nn.Module, small: nn.Module, x: Tensor, held_out: Tensor | None, seed: int) -> dict[str, Any]:
    """FVU of the whole head's output."""
    record = {"fitted": fvu_interval(row_squares(head(x), small(x)), seed)}
    if held_out is not None:
        record["held_out"] = fvu_interval(row_squares(head(held_out), small(held_out)), seed)
    return record


def flops(parts: list[nn.Module]) -> int:
    """Multiply-adds of the linear layers for one row."""
    total = 0
    for part in parts:
        if isinstance(part, LowRankLinear):
            total += part.rank * (part.A.in_features + part.B.out_features)
        elif isinstance(part, Int8LowRank):
            total += part.A.numel() + part.B.numel()
        elif isinstance(part, nn.Linear):
            total += part.weight.numel()
    return total
