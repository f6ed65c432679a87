"""What a compressed head lost: achieved and floor FVU of its layers, rank curve, intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from distil_rank.compress.head_layers import Fitted
from distil_rank.compress.quantise import (
    Int8Certificate,
    QuantLinear,
    certify_int8,
    dequantised,
    module_bytes,
)
from distil_rank.core.agreement import function_kept, measure_for
from distil_rank.core.errors import InputError
from distil_rank.core.functions import FunctionCertificate
from distil_rank.core.heads import UnitNorm
from distil_rank.core.intervals import DRAWS, bootstrap_counts, percentile_interval
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import Joint, Optimum, floor_fvu, leading_eigenpairs
from distil_rank.core.moments import Moments
from distil_rank.core.narrow import NarrowCertificate
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
    function: FunctionCertificate | NarrowCertificate | None  # of a head that is one student
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


@dataclass
class Student:
    """The parts of a compressed head, and what is known of them."""

    parts: list[nn.Module]
    layers: list[LayerCertificate]
    blend: Blend | None = None
    function: FunctionCertificate | NarrowCertificate | None = None


def certify_head(
    head: nn.Module,
    small: nn.Module,
    found: Student,
    rows: Mapping[str, Tensor],
    request: Mapping[str, float],
    metric: str,
    seed: int,
) -> HeadCertificate:
    """Of the whole head, on rows by name: fitted and, where there are some, held_out."""
    outputs = {name: (head(x), small(x)) for name, x in rows.items()}
    last = head[-1] if isinstance(head, nn.Sequential) else head
    y, other = outputs["held_out" if "held_out" in outputs else "fitted"]
    measure = measure_for(y.shape[1], isinstance(last, UnitNorm))
    kept = {}
    with suppress(InputError):  # of few or equal rows nothing is known
        kept[measure] = function_kept(y, other, measure, seed)
    return HeadCertificate(
        request=dict(request),
        metric=metric,
        rows=len(rows["fitted"]),
        held_out_rows=len(rows["held_out"]) if "held_out" in rows else None,
        flops_ratio=flops([head]) / flops([small]),
        bytes_before=module_bytes(head),
        bytes_after=module_bytes(small),
        output_fvu={name: fvu_interval(*pair, seed) for name, pair in outputs.items()},
        kept=kept,
        function=found.function,
        prior=found.blend,
        layers=found.layers,
    )


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


def certify_layers(
    parts: Sequence[nn.Module],
    small: Sequence[nn.Module],
    fitted: Sequence[Fitted],
    held_out: Tensor | None,
    seed: int,
) -> list[LayerCertificate]:
    """One certificate a linear layer, from the factors as they are stored."""
    if held_out is None:
        return [_certify(found, None, None) for found in fitted]
    known, certificates = {found.target.place: found for found in fitted}, []
    x = reached = held_out  # on their way through both heads
    for i, (part, new) in enumerate(zip(parts, small)):
        y, other = part(x), new(reached)
        if i in known:
            both = Moments.of(torch.cat([reached, y], 1))
            lost = fvu_interval(y, other, seed) if new is not part else None
            certificates.append(_certify(known[i], Joint.of(both, reached.shape[1]), lost))
        x, reached = y, other
    return certificates


def _certify(found: Fitted, held: Joint | None, lost: Metric | None) -> LayerCertificate:
    """`held`: moments of what reaches the student on held-out rows and of the dense output."""
    target, student = found.target, found.student
    layer = target.layer
    shape = layer.in_features, layer.out_features
    if not isinstance(student, LowRankLinear):
        note = "stays dense: factors would not be smaller"
        note += "" if student is layer else "; refitted to its changed inputs"
        return LayerCertificate(str(target.place), *shape, None, note, held_out_fvu_interval=lost)
    joint = target.joint(found.reads)
    stored = student if found.int8 is None else dequantised(found.int8)
    eight = None if found.int8 is None else certify_int8(student, found.int8, held or joint)
    rank = student.rank
    return LayerCertificate(
        *(str(target.place), *shape, rank),
        achieved_fvu=joint.fvu(stored),
        floor_fvu=floor_fvu(joint.outputs, rank),
        held_out_achieved_fvu=None if held is None else held.fvu(stored),
        held_out_floor_fvu=None if held is None else floor_fvu(held.outputs, rank),
        held_out_fvu_interval=lost,
        parameters_before=shape[0] * shape[1],
        parameters_after=rank * sum(shape),
        rank_curve=rank_curve(target.best, held),
        int8=eight,
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


def flops(parts: Iterable[nn.Module]) -> int:
    """Multiply-adds of the linear layers for one row."""
    layers = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear | QuantLinear)]
    return sum(layer.in_features * layer.out_features for layer in layers)
