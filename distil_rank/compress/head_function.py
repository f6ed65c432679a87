"""A whole head as one student of its function: one low-rank map, or one narrow layer."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distil_rank.compress.head_certificate import LayerCertificate, Student, flops
from distil_rank.compress.head_layers import Request
from distil_rank.compress.quantise import certify_int8, dequantised, quantise
from distil_rank.core.errors import InputError
from distil_rank.core.functions import FunctionCertificate, distill_function, fvu
from distil_rank.core.heads import UnitNorm
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import Joint
from distil_rank.core.moments import Moments
from distil_rank.core.narrow import NarrowCertificate, distill_narrow
from distil_rank.core.records import Record


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
) -> Student:
    """A head as one narrow layer."""
    before, f, after = split(parts)
    x, held_out = before(x), None if held_out is None else before(held_out)
    shape = x.shape[1], f(x[:2]).shape[1]
    if request.fvu is not None or int8:
        got = "int8" if int8 else "fvu"
        raise InputError(f"rank, speedup or bytes required for a narrow layer, got {got}")
    width = affordable(parts, request, *shape, bias=True)
    new, found = distill_narrow(f, x, width, after, seed=seed)
    measured: Record = {"achieved_fvu": found.achieved_fvu}
    if held_out is not None:
        measured["held_out_achieved_fvu"] = fvu(after(new(held_out)), after(f(held_out)))
    if isinstance(new, LowRankLinear):  # no bent feature helped: as wide as a map can be
        width = new.rank
    note = f"the whole head as one narrow layer, {found.bent} of its features bent"
    return _student(parts, shape, width, new, found, measured | {"note": note})


def whole_student(
    parts: Sequence[nn.Module],
    x: Tensor,
    held_out: Tensor | None,
    request: Request,
    int8: bool,
    seed: int,
) -> Student:
    """A head as one low-rank map."""
    before, f, _ = split(parts)
    x, held_out = before(x), None if held_out is None else before(held_out)
    shape = x.shape[1], f(x[:2]).shape[1]
    limit = min(shape)

    def at(rank: int) -> tuple[LowRankLinear, FunctionCertificate]:
        return distill_function(f, x, rank, held_out=held_out, seed=seed)

    if request.fvu is not None:
        ranks, wanted = range(1, limit + 1), request.fvu
        place = bisect.bisect_left(ranks, True, key=lambda r: at(r)[1].achieved_fvu <= wanted)
        if place == limit:
            least = at(limit)[1].achieved_fvu
            raise InputError(
                f"an FVU of at least {least:.3g} required, which no linear map is below, got"
                f" {wanted}; fit the head layer by layer with --metric output"
            )
        rank = ranks[place]
    else:
        rank = min(limit, affordable(parts, request, *shape, int8))
    new, found = at(rank)
    names = ("achieved_fvu", "floor_fvu", "held_out_achieved_fvu", "held_out_floor_fvu")
    measured: Record = {name: getattr(found, name) for name in names}
    if int8:
        rows = {"": x} | ({} if held_out is None else {"held_out_": held_out})
        pairs = {side: torch.cat([v, f(v)], 1) for side, v in rows.items()}
        joints = {side: Joint.of(Moments.of(pair), shape[0]) for side, pair in pairs.items()}
        plain, new = new, quantise(new, joints[""].input_mean, joints[""].inputs)
        stored = dequantised(new)
        measured |= {f"{side}achieved_fvu": joint.fvu(stored) for side, joint in joints.items()}
        measured["int8"] = certify_int8(plain, new, list(joints.values())[-1])
    note = "the whole head as one map"
    return _student(parts, shape, rank, new, found, measured | {"note": note})


def _student(
    parts: Sequence[nn.Module],
    shape: tuple[int, int],
    width: int,
    new: nn.Module,
    found: FunctionCertificate | NarrowCertificate,
    measured: Record,
) -> Student:
    """The head with `new`, trained where the head is (not in eight bits), and its certificate."""
    before, f, after = split(parts)
    trained = any(p.requires_grad for p in f.parameters())
    new.requires_grad_(trained and "int8" not in measured)
    layers = list(new) if isinstance(new, nn.Sequential) else [new]
    measured |= {"parameters_before": flops(parts), "parameters_after": width * sum(shape)}
    layer = LayerCertificate("head", *shape, width, **measured)
    return Student([*before, *layers, *after], [layer], function=found)


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
