"""Compress a linear layer, or a head of several, on the activations that really reach each layer.

    student, certificate = compress_head(nn.Sequential(nn.Linear(1280, 512), nn.GELU(), nn.Linear(512, 10)), x, speedup=5)

Layers are fitted in order: each reads what the compressed layers before it put out and imitates the teacher's own output there
(`solutions.drifted_student`), in the metric of what the rest of the head, or the next linear layer, makes of it. A layer that
stays dense is refitted to its changed inputs, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.compress.certificates import equal_bytes, flops, fvu_interval, layer_certificate, output_fvu, row_squares
from distil_rank.compress.head_plan import METRICS, Request, Target, choose_ranks, find_targets
from distil_rank.compress.quantise import certify_int8, imitated, module_bytes, quantise
from distil_rank.compress.sites import evaluating
from distil_rank.core.lowrank import Drift, drifted_map, drifted_student
from distil_rank.experiment.teachers import linear
from distil_rank.core.moments import Moments


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
) -> tuple[nn.Module, dict[str, Any]]:
    """Compressed copy of an `nn.Linear` or `nn.Sequential` and its certificate (a JSON record).

    x (n, d_in): rows to fit on; held_out: rows to measure on. metric: fit every layer for its "own" output, for that of the
    "next" linear layer, or for the "output" of the head (which then also shares out the ranks); by default for the output,
    or its own where `fvu` is asked of it. prior: moments of x from other proteins, blended in for the first layer (see
    `prior`). Layers that factors would not make smaller stay dense.
    """
    request = Request(rank, fvu, speedup, bytes)
    request.check()
    if metric is None:
        metric = "output" if fvu is None else "own"
    if metric not in METRICS:
        raise InputError(f"a metric out of {', '.join(METRICS)} required, got {metric!r}")
    parts: list[nn.Module] = (
        [head] if isinstance(head, nn.Linear) else list(head) if type(head) is nn.Sequential else []
    )
    first = next((part for part in parts if isinstance(part, nn.Linear)), None)
    if first is None:
        raise InputError(f"an nn.Linear, or an nn.Sequential with at least one, required, got {type(head).__name__}")
    check_rows(x, first.in_features, "data")
    if held_out is not None:
        check_rows(held_out, first.in_features, "held-out data")
    x, held_out = x.to(first.weight), None if held_out is None else held_out.to(first.weight)
    with evaluating(head), torch.no_grad():
        targets, blend = find_targets(parts, x, prior, metric, min(rank or 64, *first.weight.shape), seed)
        chosen = choose_ranks(parts, targets, request, int8, metric == "output")
        small, layers = _fit(parts, targets, chosen, x, held_out, int8, seed)
        module: nn.Module = small[0] if isinstance(head, nn.Linear) else nn.Sequential(*small)
        module.train(head.training)
        certificate = {
            "schema": "distil-rank/certificate/1",
            "request": request.given,
            "metric": metric,
            "rows": len(x),
            "held_out_rows": None if held_out is None else len(held_out),
            "flops_ratio": flops(parts) / flops(small),
            "bytes_before": module_bytes(head),
            "bytes_after": module_bytes(module),
            "output_fvu": output_fvu(head, module, x, held_out, seed),
            "prior": blend and asdict(blend),
            "layers": layers,
        }
    return module, certificate


def check_rows(x: Tensor, d_in: int, what: str) -> None:
    if x.ndim != 2 or x.shape[1] != d_in:
        raise InputError(f"{what} of shape (n, {d_in}) required for this layer, got {tuple(x.shape)}")
    if len(x) < 2:
        raise InputError(f"at least 2 rows of {what} required, got {len(x)}")
    bad = int((~x.isfinite()).any(1).sum())
    if bad:
        raise InputError(f"finite {what} required, got NaN or infinity in {bad} of {len(x)} rows; remove them")


def _fit(
    parts: Sequence[nn.Module],
    targets: Sequence[Target],
    chosen: dict[int, int | None],
    x: Tensor,
    held_out: Tensor | None,
    int8: bool,
    seed: int,
) -> tuple[list[nn.Module], list[dict[str, Any]]]:
    """Compressed parts in order, and one record a linear layer."""
    small: list[nn.Module] = []
    records = []
    dense_held, held, changed = held_out, held_out, False
    for i, part in enumerate(parts):
        new = part
        if isinstance(part, nn.Linear):
            target, rank = next(t for t in targets if t.place == i), chosen[i]
            record: dict[str, Any] = {
                "name": str(i),
                "d_in": part.in_features,
                "d_out": part.out_features,
                "rank": rank,
            }
            if rank is not None:
                measured = None if dense_held is None else _drift(part, dense_held, held if changed else None)
                new, more = _student(target, rank, x if changed else None, measured, int8)
                record |= more
                changed = True
            else:
                record["note"] = "stays dense: factors would not be smaller"
                if changed:
                    new = _refitted(part, _drift(part, target.inputs, x))
                    record["note"] += "; refitted to its changed inputs"
            if dense_held is not None and held is not None and changed:
                record["held_out_fvu_interval"] = fvu_interval(row_squares(part(dense_held), new(held)), seed)
            records.append(record)
        small.append(new)
        x = new(x)
        if dense_held is not None and held is not None:
            dense_held, held = part(dense_held), new(held)
    return small, records


def _student(
    target: Target, rank: int, changed: Tensor | None, held: Drift | None, int8: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The student of a layer that reads `changed` (None: what the dense head feeds it), and its certificate."""
    layer = target.layer
    drift = _drift(layer, target.inputs, changed)
    fitted = drift if changed is not None else Drift.none(layer.weight, layer.bias, target.moments)
    if changed is not None:
        student = drifted_student(layer.weight, drift, rank, metric=target.metric)
    elif target.metric is not None:
        student = drifted_student(layer.weight, fitted, rank, ridge=float("inf"), metric=target.metric)
    else:
        student = target.spectrum.student(layer.weight.double(), layer.bias, rank)
    new: nn.Module = student.to(layer.weight)
    record: dict[str, Any] = {}
    if int8:
        new = quantise(student, imitated(student, fitted))
        record["int8"] = asdict(certify_int8(student, new, held or drift))
    record |= layer_certificate(layer, new, target.spectrum, drift, held)
    if changed is None and target.metric is None:
        record["equal_bytes"] = equal_bytes(layer, target.spectrum, fitted, held or drift, module_bytes(new))
    return new, record


def _refitted(layer: nn.Linear, drift: Drift) -> nn.Linear:
    """The layer that imitates the dense one best on its changed inputs."""
    M, _ = drifted_map(layer.weight, drift)
    weight, bias = (t.to(layer.weight) for t in (M, drift.output_mean - M @ drift.input_mean))
    return linear(weight, bias)


def _drift(layer: nn.Linear, x: Tensor, changed: Tensor | None) -> Drift:
    if changed is None:
        return Drift.none(layer.weight, layer.bias, Moments.of(x))
    return Drift.of(Moments.of(torch.cat([changed, layer(x)], 1)), layer.in_features)
