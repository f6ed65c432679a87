"""What a compressed head lost: achieved and floor FVU, rank curve, intervals, equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from distil_rank.compress.quantise import Choice, Int8Certificate, Int8LowRank
from distil_rank.core.functions import FunctionCertificate
from distil_rank.core.intervals import DRAWS, bootstrap_counts, percentile_interval
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import Joint, Optimum, floor_fvu, leading_eigenpairs
from distil_rank.core.prior import Blend
from distil_rank.core.randomness import generator
from distil_rank.core.records import Metric, Record, interval

SCHEMA = "distil-rank/certificate/1"
CURVE_POINTS = 40


@dataclass(frozen=True)
class RankCurve:
    """FVU by rank, thinned; on held-out rows that of the same students, and the floor there."""

    rank: list[int]
    fvu: list[float]
    held_out_fvu: list[float] | None = None
    held_out_floor_fvu: list[float] | None = None


@dataclass(frozen=True)
class EqualBytes:
    """What other precisions would reach with the bytes of the chosen student."""

    bytes: int
    choices: list[Choice]
    best: Choice | None


@dataclass(frozen=True)
class LayerCertificate:
    """One linear layer; rank None: it stays dense, and `note` says why."""

    name: str
    d_in: int
    d_out: int
    rank: int | None
    note: str | None = None
    achieved_fvu: float | None = None
    floor_fvu: float | None = None
    held_out_achieved_fvu: float | None = None
    held_out_floor_fvu: float | None = None
    held_out_fvu_interval: Metric | None = None
    parameters_before: int | None = None
    parameters_after: int | None = None
    rank_curve: RankCurve | None = None
    int8: Int8Certificate | None = None
    equal_bytes: EqualBytes | None = None


@dataclass(frozen=True)
class HeadCertificate:
    """The request, the cost and the loss of a compressed layer or head."""

    request: dict[str, float]
    metric: str
    rows: int
    held_out_rows: int | None
    flops_ratio: float
    bytes_before: int
    bytes_after: int
    output_fvu: dict[str, Metric]  # of the head's output on the fitted and the held-out rows
    kept: dict[str, Metric]  # of the function on held-out rows, else fitted ones, by measure
    prior: Blend | None
    function: FunctionCertificate | None  # of a head that is one map
    layers: list[LayerCertificate]

    def record(self) -> Record:
        """As JSON; what was not measured of a layer is left out."""

        def known(fields: Record) -> Record:
            return {k: v for k, v in fields.items() if v is not None or k == "rank"}

        record = asdict(self)
        for layer in record["layers"]:
            if layer["rank_curve"]:
                layer["rank_curve"] = known(layer["rank_curve"])
        return {"schema": SCHEMA, **record, "layers": [known(x) for x in record["layers"]]}


def rank_curve(best: Optimum, held: Joint | None) -> RankCurve:
    """FVU of the students of `best` by rank, on the fitted rows and on held-out ones."""
    limit = len(best.eigenvalues)
    ranks = sorted({round(limit ** (k / CURVE_POINTS)) for k in range(CURVE_POINTS + 1)})
    fvu = best.fvu[ranks].tolist()
    if held is None or float(held.outputs.trace()) <= 0:
        return RankCurve(ranks, fvu)
    variance, U = held.outputs.trace(), best.basis
    shift = held.output_mean - best.output_mean
    explained = ((held.outputs @ U) * U).sum(0) + (U.T @ shift).square()
    missed = (variance + shift @ shift - explained.cumsum(0)).clamp_min(0) / variance
    floors = (1 - leading_eigenpairs(held.outputs, limit)[0].cumsum(0) / variance).clamp_min(0)
    at = [r - 1 for r in ranks]
    return RankCurve(ranks, fvu, missed[at].tolist(), floors[at].tolist())


def certify_layer(
    name: str,
    layer: nn.Linear,
    student: LowRankLinear,
    best: Optimum,
    joint: Joint,
    held: Joint | None,
) -> LayerCertificate:
    """Of a student on the fitted rows and the held-out ones; `best` has its rank curve."""
    rank, d_in, d_out = student.rank, layer.in_features, layer.out_features
    return LayerCertificate(
        *(name, d_in, d_out, rank),
        achieved_fvu=joint.fvu(student),
        floor_fvu=floor_fvu(joint.outputs, rank),
        held_out_achieved_fvu=None if held is None else held.fvu(student),
        held_out_floor_fvu=None if held is None else floor_fvu(held.outputs, rank),
        parameters_before=d_in * d_out,
        parameters_after=rank * (d_in + d_out),
        rank_curve=rank_curve(best, held),
    )


def fvu_interval(y: Tensor, other: Tensor, seed: int) -> Metric:
    """FVU of `other` (n, d) as a model of y (n, d), with its bootstrap interval over rows."""
    y, other = y.detach().cpu().double(), other.detach().cpu().double()
    errors, squares = (other - y).square().sum(1), (y - y.mean(0)).square().sum(1)
    rows = torch.stack([errors, squares], 1)

    def fvu(sums: Tensor) -> Tensor:
        return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1].clamp_min(1e-300), 0.0)

    counts = bootstrap_counts(len(rows), DRAWS, generator(seed, "bootstrap over rows"))
    return interval(float(fvu(rows.sum(0))), *percentile_interval(fvu(counts @ rows)), False)


def flops(parts: Sequence[nn.Module]) -> int:
    """Multiply-adds of the linear layers for one row."""
    total = 0
    for part in parts:
        if isinstance(part, LowRankLinear):
            total += part.A.weight.numel() + part.B.weight.numel()
        elif isinstance(part, Int8LowRank):
            total += part.A.numel() + part.B.numel()
        elif isinstance(part, nn.Linear):
            total += part.weight.numel()
    return total
