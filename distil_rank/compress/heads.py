"""Compress a linear layer, or a head of several, on the activations that really reach each layer.

    head = nn.Sequential(nn.Linear(1280, 512), nn.GELU(), nn.Linear(512, 10))
    student, certificate = compress_head(head, x, speedup=5)

Layers are fitted in order: each reads the outputs of the compressed layers before it and imitates
the teacher's own output there (`core.lowrank.Joint`), in the metric of what the rest of the head
makes of it (`head_metrics`). A layer that stays dense is refitted to its changed inputs, at no cost
in size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from distil_rank.compress.head_certificate import (
    EqualBytes,
    HeadCertificate,
    LayerCertificate,
    certify_layer,
    flops,
    fvu_interval,
)
from distil_rank.compress.head_function import whole_student
from distil_rank.compress.head_metrics import METRICS
from distil_rank.compress.head_plan import Request, Target, choose_ranks, find_targets
from distil_rank.compress.quantise import (
    at_equal_bytes,
    certify_int8,
    imitated,
    module_bytes,
    quantise,
)
from distil_rank.compress.sites import evaluating
from distil_rank.core.agreement import function_kept, measure_for
from distil_rank.core.errors import InputError
from distil_rank.core.heads import UnitNorm
from distil_rank.core.linear import linear
from distil_rank.core.lowrank import Joint, optimum, require_finite
from distil_rank.core.moments import Moments
from distil_rank.core.records import Metric

WHOLE = "whole"  # of `metric`: one map for the head
BLEND_RANK = 64  # at which the blend is chosen where no rank is asked for


def compress_head(
    head: nn.Module,
    x: Tensor,
    held_out: Tensor | None = None,
    *,
    rank: int | None = None,
    fvu: float | None = None,
    speedup: float | None = None,
    bytes: int | None = None,
    metric: str | None = None,
    prior: Moments | None = None,
    int8: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, HeadCertificate]:
    """Compressed copy of an `nn.Linear` or `nn.Sequential`, and its certificate.

    x (n, d_in): rows to fit on; held_out: rows to measure on. metric: fit every layer for its "own"
    output, for that of the "next" linear layer, or for the "output" of the head (which then also
    shares out the ranks); by default for the output, or its own where `fvu` is asked of it; "whole"
    makes the head one low-rank map instead (`core.functions`). prior: moments of x from other
    proteins, blended in for the first layer (see `core.prior`). Layers that factors would not make
    smaller stay dense.

    >>> x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    >>> head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> small, certificate = compress_head(head, x, rank=2)
    >>> small[0].rank, small(x).shape
    (2, torch.Size([200, 3]))
    """
    request = Request(rank, fvu, speedup, bytes)
    request.check()
    metric = metric or ("output" if fvu is None else "own")
    check_metric(metric, prior)
    parts = parts_of(head)
    first = next(part for part in parts if isinstance(part, nn.Linear))
    check_rows(x, first.in_features, "data")
    x = x.to(first.weight)
    if held_out is not None:
        check_rows(held_out, first.in_features, "held-out data")
        held_out = held_out.to(first.weight)
    with evaluating(head), torch.no_grad():
        blend, function = None, None
        if metric == WHOLE:
            small, layer, function = whole_student(parts, x, held_out, request, int8, seed)
            layers = [layer]
        else:
            blend_rank = min(rank or BLEND_RANK, *first.weight.shape)
            targets, blend = find_targets(parts, x, prior, metric, blend_rank, seed)
            chosen = choose_ranks(parts, targets, request, int8, metric == "output")
            small, layers = _fit(parts, targets, chosen, x, held_out, int8, seed)
        module: nn.Module = small[0] if isinstance(head, nn.Linear) else nn.Sequential(*small)
        measured = {"fitted": x} | ({} if held_out is None else {"held_out": held_out})
        outputs = {name: (head(rows), module(rows)) for name, rows in measured.items()}
        vector = isinstance(parts[-1], UnitNorm)
        certificate = HeadCertificate(
            request=request.given,
            metric=metric,
            rows=len(x),
            held_out_rows=None if held_out is None else len(held_out),
            flops_ratio=flops(parts) / flops(small),
            bytes_before=module_bytes(head),
            bytes_after=module_bytes(module),
            output_fvu={name: fvu_interval(*pair, seed) for name, pair in outputs.items()},
            kept=kept_of(*list(outputs.values())[-1], vector, seed),
            function=function,
            prior=blend,
            layers=layers,
        )
    for part, new in zip(parts, small):
        if metric != WHOLE and new is not part:
            new.train(part.training)
    module.training = head.training
    return module, certificate


def check_metric(metric: str, prior: Moments | None) -> None:
    if metric not in (*METRICS, WHOLE):
        raise InputError(f"a metric out of {', '.join(METRICS)}, {WHOLE} required, got {metric!r}")
    if metric == WHOLE and prior is not None:
        raise InputError("no prior required for a whole head, got one; its moments know no output")


def kept_of(y: Tensor, found: Tensor, vector: bool, seed: int) -> dict[str, Metric]:
    """What is kept of the outputs y (n, d), by the measure that fits; none of few or equal rows."""
    measure = measure_for(y.shape[1], vector)
    try:
        return {measure: function_kept(y, found, measure, seed)}
    except InputError:
        return {}


def parts_of(head: nn.Module) -> list[nn.Module]:
    """The layers of a head in order; InputError where it is no head."""
    single = isinstance(head, nn.Linear)
    parts = [head] if single else []
    if isinstance(head, nn.Sequential) and type(head).forward is nn.Sequential.forward:
        parts = list(head)
    if not any(isinstance(part, nn.Linear) for part in parts):
        got = type(head).__name__
        raise InputError(
            f"an nn.Linear, or an nn.Sequential with at least one, required, got {got}"
        )
    return parts


def check_rows(x: Tensor, d_in: int, what: str) -> None:
    if x.ndim != 2 or x.shape[1] != d_in:
        shape = tuple(x.shape)
        raise InputError(f"{what} of shape (n, {d_in}) required for this layer, got {shape}")
    if len(x) < 2:
        raise InputError(f"at least 2 rows of {what} required, got {len(x)}")
    bad = int((~x.isfinite()).any(1).sum())
    if bad:
        got = f"NaN or infinity in {bad} of {len(x)} rows"
        raise InputError(f"finite {what} required, got {got}; remove them")


def _fit(
    parts: Sequence[nn.Module],
    targets: Sequence[Target],
    chosen: dict[int, int | None],
    x: Tensor,
    held_out: Tensor | None,
    int8: bool,
    seed: int,
) -> tuple[list[nn.Module], list[LayerCertificate]]:
    """Compressed parts in order, and one certificate a linear layer."""
    small: list[nn.Module] = []
    certificates = []
    known = {target.place: target for target in targets}
    dense, held, changed = held_out, held_out, False  # held-out rows on their way through
    for i, part in enumerate(parts):
        new = part
        if isinstance(part, nn.Linear):
            target, rank, reached = known[i], chosen[i], x if changed else None
            if rank is not None:
                measured = None
                if dense is not None:
                    measured = _joint(part, dense, held if changed else None)
                new, certificate = _student(target, rank, reached, measured, int8)
                changed = True
            else:
                new, certificate = _dense(target, reached)
            if dense is not None and held is not None and changed:
                lost = fvu_interval(part(dense), new(held), seed)
                certificate = replace(certificate, held_out_fvu_interval=lost)
            certificates.append(certificate)
        small.append(new)
        x = new(x)
        if dense is not None and held is not None:
            dense, held = part(dense), new(held)
    return small, certificates


def _student(
    target: Target, rank: int, changed: Tensor | None, held: Joint | None, int8: bool
) -> tuple[nn.Module, LayerCertificate]:
    """The student of a layer that reads `changed` (None: what the dense head feeds it)."""
    layer, best, G = target.layer, target.best, target.metric
    joint = _joint(layer, target.inputs, changed)
    if changed is not None:
        fitted = joint
        exact = joint.optimum(layer.weight, metric=G, rank=rank).student(rank)
    else:
        fitted = Joint.of_layer(layer.weight, layer.bias, target.moments)
        if G is not None:
            best = optimum(layer.weight, layer.bias, target.moments, rank, G)
        exact = best.student(rank)
    student = exact.to(layer.weight).requires_grad_(layer.weight.requires_grad)
    require_finite(student)
    new: nn.Module = student
    measured, eight, equal = student, None, None
    if int8:
        new = quantise(student, imitated(student, fitted))
        measured, eight = new.dequantised(), certify_int8(student, new, held or joint)
    if changed is None and G is None:
        size = module_bytes(new)
        choices = at_equal_bytes(best.student, fitted, held or joint, size)
        equal = EqualBytes(size, choices, min(choices, key=lambda c: c.fvu, default=None))
    certificate = certify_layer(str(target.place), layer, measured, target.best, joint, held)
    return new, replace(certificate, int8=eight, equal_bytes=equal)


def _dense(target: Target, changed: Tensor | None) -> tuple[nn.Linear, LayerCertificate]:
    """A layer that stays dense imitates the teacher's best on its changed inputs."""
    layer, note = target.layer, "stays dense: factors would not be smaller"
    shape = layer.in_features, layer.out_features
    if changed is not None:
        joint = _joint(layer, target.inputs, changed)
        M, _ = joint.regression(layer.weight)
        bias = joint.output_mean - M @ joint.input_mean
        note += "; refitted to its changed inputs"
        trained = layer.weight.requires_grad
        layer = linear(M.to(layer.weight), bias.to(layer.weight)).requires_grad_(trained)
    return layer, LayerCertificate(str(target.place), *shape, None, note)


def _joint(layer: nn.Linear, x: Tensor, changed: Tensor | None) -> Joint:
    """Moments of what a student reads, x or `changed` (n, d_in), and of the layer's output."""
    if changed is None:
        return Joint.of_layer(layer.weight, layer.bias, Moments.of(x))
    return Joint.of(Moments.of(torch.cat([changed, layer(x)], 1)), layer.in_features)
