"""Compress a linear layer, or a head of several, on the activations that really reach each layer.

    student, certificate = compress_head(nn.Sequential(nn.Linear(1280, 512), nn.GELU(), nn.Linear(512, 10)), x, speedup=5)

Layers are fitted in order: each reads what the compressed layers before it put out and imitates the teacher's own output there
(`solutions.drifted_student`), on request in the metric of what the next linear layer, or the whole rest of the head, makes of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from distil_rank.errors import InputError
from distil_rank.layers.certificates import equal_bytes, flops, fvu_interval, layer_certificate, output_fvu, row_squares
from distil_rank.layers.lowrank import smallest_rank
from distil_rank.layers.prior import FOLDS, Blend, blended_spectrum
from distil_rank.layers.quantise import certify_int8, imitated, module_bytes, quantise
from distil_rank.layers.ranks import Layer, allocate
from distil_rank.layers.sites import evaluating
from distil_rank.layers.solutions import Drift, Spectrum, drifted_student, metric_root, spectrum_from_inputs
from distil_rank.randomness import generator
from distil_rank.statistics.moments import Moments

PROBES = 8  # random directions a row for the metric
METRICS = ("own", "next", "output")


@dataclass(frozen=True)
class Request:
    """How small: exactly one of these."""

    rank: int | None = None  # of every layer
    fvu: float | None = None  # of every layer, at most
    speedup: float | None = None  # FLOPs before / after
    bytes: int | None = None  # of all weights after

    def check(self) -> None:
        given = {k: v for k, v in asdict(self).items() if v is not None}
        if len(given) != 1:
            raise InputError(f"exactly one of rank, fvu, speedup and bytes required, got {given or 'none'}")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")
        if self.fvu is not None and not 0 < self.fvu < 1:
            raise InputError(f"fvu must be between 0 and 1, got {self.fvu}")
        if self.speedup is not None and not 1 < self.speedup < 1e6:
            raise InputError(f"speedup must be above 1, got {self.speedup}")
        if self.bytes is not None and self.bytes < 1:
            raise InputError(f"bytes must be positive, got {self.bytes}")


def compress_head(
    head: nn.Module,
    x: Tensor,
    held_out: Tensor | None = None,
    *,
    rank: int | None = None,
    fvu: float | None = None,
    speedup: float | None = None,
    bytes: int | None = None,
    metric: str = "own",
    prior: Moments | None = None,
    int8: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """Compressed copy of an `nn.Linear` or `nn.Sequential` and its certificate (a JSON record).

    x (n, d_in): rows to fit on; held_out: rows to measure on. metric: fit every layer for its
    "own" output, for that of the "next" linear layer, or for the "output" of the head (which then also shares out the ranks).
    prior: moments of x from other proteins, blended in for the first layer (see `prior`). Layers that factors would not make
    smaller stay dense.
    """
    request = Request(rank, fvu, speedup, bytes)
    request.check()
    if metric not in METRICS:
        raise InputError(f"a metric out of {', '.join(METRICS)} required, got {metric!r}")
    parts: list[nn.Module] = (
        [head] if isinstance(head, nn.Linear) else list(head) if type(head) is nn.Sequential else []
    )
    places = [i for i, part in enumerate(parts) if isinstance(part, nn.Linear)]
    if not places:
        raise InputError(f"an nn.Linear, or an nn.Sequential with at least one, required, got {type(head).__name__}")
    first = cast(nn.Linear, parts[places[0]])
    check_rows(x, first.in_features, "data")
    if held_out is not None:
        check_rows(held_out, first.in_features, "held-out data")
    x, held_out = x.to(first.weight), None if held_out is None else held_out.to(first.weight)
    with evaluating(head), torch.no_grad():
        inputs = _inputs(parts, x)
        spectra, blend = _spectra(parts, places, inputs, prior, min(rank or 64, first.in_features))
        metrics = {} if metric == "own" else _metrics(parts, places, inputs, metric, seed)
        tails = _tails(parts, spectra, inputs, metrics if metric == "output" else {})
        chosen = _choose(parts, places, spectra, tails, request, int8)
        small, layers = _fit(parts, places, inputs, spectra, chosen, held_out, metrics, int8, prior is not None, seed)
        module: nn.Module = small[0] if isinstance(head, nn.Linear) else nn.Sequential(*small)
        module.train(head.training)
        certificate = {
            "schema": "distil-rank/certificate/1",
            "request": {k: v for k, v in asdict(request).items() if v is not None},
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


def _inputs(parts: list[nn.Module], x: Tensor) -> list[Tensor]:
    """What reaches each part, and last the output."""
    states = [x]
    for part in parts:
        states.append(part(states[-1]))
    return states


def _spectra(
    parts: list[nn.Module], places: list[int], inputs: list[Tensor], prior: Moments | None, rank: int
) -> tuple[dict[int, Spectrum], Blend | None]:
    spectra: dict[int, Spectrum] = {}
    blend = None
    for order, i in enumerate(places):
        layer = parts[i]
        assert isinstance(layer, nn.Linear)
        limit = min(layer.weight.shape)
        if order == 0 and prior is not None:
            folds = [Moments.of(inputs[i][f::FOLDS]) for f in range(FOLDS) if len(inputs[i]) > f]
            spectra[i], blend = blended_spectrum(
                layer.weight, layer.bias, "input", folds, prior, max(1, min(rank, limit)), limit
            )
        else:
            spectra[i] = spectrum_from_inputs(layer.weight, Moments.of(inputs[i]))
    return spectra, blend


def _limit(layer: nn.Linear) -> int:
    d_in, d_out = layer.in_features, layer.out_features
    return min(d_in, d_out, (d_in * d_out - 1) // (d_in + d_out))


def _choose(
    parts: list[nn.Module],
    places: list[int],
    spectra: dict[int, Spectrum],
    tails: dict[int, tuple[Tensor, float | None]],
    request: Request,
    int8: bool,
) -> dict[int, int | None]:
    """Rank of every linear part, None where it stays dense."""
    layers = {i: part for i, part in enumerate(parts) if i in places and isinstance(part, nn.Linear)}
    if request.rank is not None:
        return {i: request.rank if request.rank <= _limit(layer) else None for i, layer in layers.items()}
    if request.fvu is not None:
        ranks = {i: smallest_rank(s.tails / max(s.variance, 1e-300), request.fvu) for i, s in spectra.items()}
        return {i: ranks[i] if ranks[i] <= _limit(layer) else None for i, layer in layers.items()}
    if request.speedup is not None:
        table = [_table_row(i, layer, tails[i], (1, 1)) for i, layer in layers.items()]
        found = allocate(table, sum(t.dense_cost for t in table) / request.speedup)
    else:
        assert request.bytes is not None
        fixed = sum(module_bytes(part) for i, part in enumerate(parts) if i not in layers)
        table = []
        for i, layer in layers.items():
            size, shape = layer.weight.element_size(), layer.in_features + layer.out_features
            fixed += layer.out_features * (4 + 4 if int8 else size)  # the bias, and the scales of B's rows
            table.append(_table_row(i, layer, tails[i], (1 + 4 / shape, size) if int8 else (size, size)))
        least = fixed + sum(min(t.rank_cost, t.dense_cost) for t in table)
        if request.bytes < least:
            raise InputError(
                f"at least {least:.0f} bytes required (rank 1 everywhere), got {request.bytes}; ask for more"
            )
        found = allocate(table, request.bytes - fixed)
    return {int(name): rank for name, rank in found.ranks.items()}


def _table_row(place: int, layer: nn.Linear, tails: tuple[Tensor, float | None], bytes: tuple[float, float]) -> Layer:
    return Layer(str(place), layer.in_features, layer.out_features, tails[0].numpy(), tails[1], bytes=bytes)


def _metrics(
    parts: list[nn.Module], places: list[int], inputs: list[Tensor], metric: str, seed: int
) -> dict[int, Tensor]:
    """G of every linear part but the last."""
    found = {}
    for i, following in pairwise(places):
        rest = parts[i + 1 : following + 1] if metric == "next" else parts[i + 1 :]
        found[i] = squared_jacobian(rest, inputs[i + 1], generator(seed, "metric", i))
    return found


def _tails(
    parts: list[nn.Module], spectra: dict[int, Spectrum], inputs: list[Tensor], metrics: dict[int, Tensor]
) -> dict[int, tuple[Tensor, float | None]]:
    """Loss at rank 0, 1, ... of every linear part and its weight: own FVUs, or with metrics the head's squared error."""
    found: dict[int, tuple[Tensor, float | None]] = {}
    for i, spectrum in spectra.items():
        if not metrics:
            found[i] = spectrum.tails, None
        elif i not in metrics:  # the last layer: its own squared error is the head's
            found[i] = spectrum.tails, 1.0
        else:
            root, layer = metric_root(metrics[i]), cast(nn.Linear, parts[i])
            found[i] = spectrum_from_inputs(root @ layer.weight.double(), Moments.of(inputs[i])).tails, 1.0
    return found


def _fit(
    parts: list[nn.Module],
    places: list[int],
    inputs: list[Tensor],
    spectra: dict[int, Spectrum],
    chosen: dict[int, int | None],
    held_out: Tensor | None,
    metrics: dict[int, Tensor],
    int8: bool,
    has_prior: bool,
    seed: int,
) -> tuple[list[nn.Module], list[dict[str, Any]]]:
    """Compressed parts in order, and one record a linear layer."""
    small: list[nn.Module] = []
    records = []
    state, changed = inputs[0], False
    dense_held, small_held = held_out, held_out
    for i, part in enumerate(parts):
        new = part
        if i in places and isinstance(part, nn.Linear):
            rank = chosen[i]
            drift = _drift(part, inputs[i], state if changed else None)
            held = None if dense_held is None else _drift(part, dense_held, small_held if changed else None)
            record: dict[str, Any] = {
                "name": str(i),
                "d_in": part.in_features,
                "d_out": part.out_features,
                "rank": rank,
            }
            if rank is None:
                record["note"] = "stays dense: factors would not be smaller"
            else:
                G = metrics.get(i)
                if not changed and (G is None or has_prior):
                    student = spectra[i].student(part.weight.double(), part.bias, rank)
                else:
                    ridge = {} if changed else {"ridge": float("inf")}
                    student = drifted_student(part.weight, drift, rank, metric=G, **ridge)
                deployed = student.to(part.weight)
                if int8:
                    new = quantise(student, imitated(student, drift))
                    record["int8"] = asdict(certify_int8(deployed, new, held or drift))
                else:
                    new = deployed
                record |= layer_certificate(part, new, spectra[i], drift, held)
                if not changed and G is None:
                    record["equal_bytes"] = equal_bytes(part, spectra[i], drift, held or drift, module_bytes(new))
                if small_held is not None and dense_held is not None:
                    errors = row_squares(part(dense_held), new(small_held))
                    record["held_out_fvu_interval"] = fvu_interval(errors, seed)
                changed = True
        small.append(new)
        state = new(state)
        if dense_held is not None and small_held is not None:
            dense_held, small_held = part(dense_held), new(small_held)
        if i in places:
            records.append(record)
    return small, records


def _drift(layer: nn.Linear, x: Tensor, changed: Tensor | None) -> Drift:
    if changed is None:
        return Drift.none(layer.weight, layer.bias, Moments.of(x))
    return Drift.of(Moments.of(torch.cat([changed, layer(x)], 1)), layer.in_features)


def squared_jacobian(parts: list[nn.Module], y: Tensor, source: torch.Generator) -> Tensor:
    """G = E[J^T J] (d, d), J the derivative of what the parts make of y (n, d).

    By random signs: J^T v with independent signs v has J^T J as its second moment, exactly so for one output. A single linear
    part gives G = H^T H.
    """
    if len(parts) == 1 and isinstance(parts[0], nn.Linear):
        H = parts[0].weight.detach().double()
        return H.T @ H
    total = torch.zeros(y.shape[1], y.shape[1], dtype=torch.float64)
    for _ in range(PROBES):
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            output = leaf
            for part in parts:
                output = part(output)
            v = torch.randint(2, output.shape, generator=source).to(output) * 2 - 1
            (gradient,) = torch.autograd.grad((output * v).sum(), leaf)
        gradient = gradient.double()
        total += gradient.T @ gradient
    return total / (PROBES * len(y))
