"""A whole head as one student of its function: one low-rank map, or one narrow layer."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distil_rank.compress.head_certificate import LayerCertificate, flops
from distil_rank.compress.head_layers import Request
from distil_rank.compress.quantise import certify_int8, dequantised, imitated, quantise
from distil_rank.core.errors import InputError
from distil_rank.core.functions import FunctionCertificate, distill_function, fvu
from distil_rank.core.heads import UnitNorm
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import Joint
from distil_rank.core.moments import Moments
from distil_rank.core.narrow import NarrowCertificate, distill_narrow


def split(parts: Sequence[nn.Module]) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """What is no target of a linear student, scalings to unit length at both ends, and the rest."""
    first, last = (isinstance(parts[i], UnitNorm) for i in (0, -1))
    end = len(parts) - last
    cuts = parts[:first], parts[first:end], parts[end:]
    return tuple(nn.Sequential(*cut).eval() for cut in cuts)  # type: ignore[return-value]


def narrow_student(
    parts: Sequence[nn.Module],
    x: Tensor,
    held_out: Tensor | None,
    request: Request,
    int8: bool,
    seed: int,
) -> tuple[list[nn.Module], LayerCertificate, FunctionCertificate | NarrowCertificate]:
    """The parts of a head with one narrow layer, and the certificates of that layer."""
    before, f, after = split(parts)
    x, held_out = before(x), None if held_out is None else before(held_out)
    d_in, d_out = x.shape[1], f(x[:2]).shape[1]
    if request.fvu is not None or int8:
        got = "int8" if int8 else "fvu"
        raise InputError(f"rank, speedup or bytes required for a narrow layer, got {got}")
    width = affordable(parts, request, d_in, d_out, bias=True)
    student, found = distill_narrow(f, x, width, after, seed=seed)
    held = None if held_out is None else fvu(after(student(held_out)), after(f(held_out)))
    student.requires_grad_(any(p.requires_grad for p in f.parameters()))
    if isinstance(student, LowRankLinear):  # no bent feature helped: as wide as a map can be
        width = student.rank
    layer = LayerCertificate(
        *("head", d_in, d_out, width),
        note=f"the whole head as one narrow layer, {found.bent} of its features bent",
        achieved_fvu=found.achieved_fvu,
        held_out_achieved_fvu=held,
        parameters_before=flops(parts),
        parameters_after=width * (d_in + d_out),
    )
    made = list(student) if isinstance(student, nn.Sequential) else [student]
    return [*before, *made, *after], layer, found


def whole_student(
    parts: Sequence[nn.Module],
    x: Tensor,
    held_out: Tensor | None,
    request: Request,
    int8: bool,
    seed: int,
) -> tuple[list[nn.Module], LayerCertificate, FunctionCertificate | NarrowCertificate]:
    """The parts of the small head, the certificate of its one map, and that of the function."""
    before, f, after = split(parts)
    x, held_out = before(x), None if held_out is None else before(held_out)
    y = f(x)
    d_in, d_out = x.shape[1], y.shape[1]
    limit = min(d_in, d_out)

    def at(rank: int) -> tuple[LowRankLinear, FunctionCertificate]:
        return distill_function(f, x, rank, held_out=held_out, seed=seed)

    if request.fvu is not None:
        ranks, wanted = range(1, limit + 1), request.fvu
        found = bisect.bisect_left(ranks, True, key=lambda r: at(r)[1].achieved_fvu <= wanted)
        if found == limit:
            least = at(limit)[1].achieved_fvu
            raise InputError(
                f"an FVU of at least {least:.3g} required, which no linear map is below, got"
                f" {wanted}; fit the head layer by layer with --metric output"
            )
        rank = ranks[found]
    else:
        rank = min(limit, affordable(parts, request, d_in, d_out, int8))
    student, certificate = at(rank)
    student.requires_grad_(any(p.requires_grad for p in f.parameters()))
    new: nn.Module = student
    achieved, held_achieved, eight = (
        certificate.achieved_fvu,
        certificate.held_out_achieved_fvu,
        None,
    )
    if int8:
        joint = measured = Joint.of(Moments.of(torch.cat([x, y], 1)), d_in)
        if held_out is not None:
            measured = Joint.of(Moments.of(torch.cat([held_out, f(held_out)], 1)), d_in)
        quantised = quantise(student, imitated(student, joint))
        new, eight = quantised, certify_int8(student, quantised, measured)
        achieved, held_achieved = joint.fvu(dequantised(quantised)), eight.fvu
    layer = LayerCertificate(
        *("head", d_in, d_out, rank),
        note="the whole head as one map",
        achieved_fvu=achieved,
        floor_fvu=certificate.floor_fvu,
        held_out_achieved_fvu=held_achieved,
        held_out_floor_fvu=certificate.held_out_floor_fvu,
        parameters_before=flops(parts),
        parameters_after=rank * (d_in + d_out),
        int8=eight,
    )
    return [*before, new, *after], layer, certificate


def affordable(
    parts: Sequence[nn.Module],
    request: Request,
    d_in: int,
    d_out: int,
    int8: bool = False,
    bias: bool = False,
) -> int:
    """Rank of a map d_in -> d_out within the request; InputError below 1. bias: of inner features.

    A student in eight bits has a scale a row; its bias is never wider than float32.
    """
    size = next(part for part in parts if isinstance(part, nn.Linear)).weight.element_size()
    if request.rank is not None:
        return request.rank
    if request.speedup is not None:
        rank = int(flops(parts) / request.speedup) // (d_in + d_out)
    else:
        assert request.bytes is not None
        each = (d_in + d_out + 4) if int8 else size * (d_in + d_out + bias)
        rank = (request.bytes - (8 if int8 else size) * d_out) // each
    if rank < 1:
        raise InputError(f"room for rank 1 required, got {request.given}; ask for more")
    return rank
