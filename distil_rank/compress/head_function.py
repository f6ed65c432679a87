"""A whole head as one low-rank map: the best linear student of the function, in closed form."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distil_rank.compress.head_certificate import LayerCertificate, flops
from distil_rank.compress.head_plan import Request
from distil_rank.compress.quantise import Int8LowRank, certify_int8, imitated, quantise
from distil_rank.core.errors import InputError
from distil_rank.core.functions import FunctionCertificate, distill_function
from distil_rank.core.heads import UnitNorm
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import Joint
from distil_rank.core.moments import Moments


def split(parts: Sequence[nn.Module]) -> tuple[list[nn.Module], nn.Sequential, list[nn.Module]]:
    """What is no target of a linear student, scalings to unit length at both ends, and the rest."""
    first, last = (isinstance(parts[i], UnitNorm) for i in (0, -1))
    end = len(parts) - last
    return list(parts[:first]), nn.Sequential(*parts[first:end]), list(parts[end:])


def whole_student(
    parts: Sequence[nn.Module],
    x: Tensor,
    held_out: Tensor | None,
    request: Request,
    int8: bool,
    seed: int,
) -> tuple[list[nn.Module], LayerCertificate, FunctionCertificate]:
    """The parts of the small head, the certificate of its one map, and that of the function."""
    before, f, after = split(parts)
    for part in before:
        x, held_out = part(x), None if held_out is None else part(held_out)
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
    new: LowRankLinear | Int8LowRank = student
    joint = Joint.of(Moments.of(torch.cat([x, y], 1)), d_in)
    measured = joint
    if held_out is not None:
        measured = Joint.of(Moments.of(torch.cat([held_out, f(held_out)], 1)), d_in)
    achieved, eight = certificate.achieved_fvu, None
    if int8:
        new = quantise(student, imitated(student, joint))
        eight = certify_int8(student, new, measured)
        achieved = joint.fvu(new.dequantised())
    note = "the whole head as one map"
    layer = LayerCertificate(
        *("head", d_in, d_out, rank, note),
        achieved_fvu=achieved,
        floor_fvu=certificate.floor_fvu,
        held_out_achieved_fvu=eight.fvu if eight else certificate.held_out_achieved_fvu,
        held_out_floor_fvu=certificate.held_out_floor_fvu,
        parameters_before=flops(parts),
        parameters_after=rank * (d_in + d_out),
        int8=eight,
    )
    return [*before, new, *after], layer, certificate


def affordable(
    parts: Sequence[nn.Module], request: Request, d_in: int, d_out: int, int8: bool = False
) -> int:
    """Rank of a map d_in -> d_out within the request; InputError below 1."""
    if request.rank is not None:
        return request.rank
    if request.speedup is not None:
        rank = int(flops(parts) / request.speedup) // (d_in + d_out)
    else:
        assert request.bytes is not None
        fixed, per_rank = (8 * d_out, d_in + d_out + 4) if int8 else (4 * d_out, 4 * (d_in + d_out))
        rank = (request.bytes - fixed) // per_rank
    if rank < 1:
        raise InputError(f"room for rank 1 required, got {request.given}; ask for more")
    return rank
