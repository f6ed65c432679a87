"""Compress a linear layer, or a head of several, on the activations that really reach each layer.

    head = nn.Sequential(nn.Linear(1280, 512), nn.GELU(), nn.Linear(512, 10))
    student, certificate = compress_head(head, x, speedup=5)

Layers are fitted in order: each reads the outputs of the compressed layers before it and imitates
the teacher's own output there, in the metric of what the rest of the head makes of it
(`head_layers`). A layer that stays dense is refitted to its changed inputs, at no cost in size. Or
the head becomes one student of its function (`head_function`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from distil_rank.compress.head_certificate import (
    HeadCertificate,
    Student,
    certify_head,
    certify_layers,
)
from distil_rank.compress.head_function import narrow_student, whole_student
from distil_rank.compress.head_layers import Request, choices_of_ranks, find_targets, fit_best
from distil_rank.compress.sites import evaluating
from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments

METRICS = ("own", "output", "whole", "narrow")
WHOLE = METRICS[2:]  # one student of the head's function
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
    output, or for the "output" of the head (which then also shares out the ranks); by default for
    the output, or its own where `fvu` is asked of it. "whole" makes the head one low-rank map
    instead (`core.functions`), "narrow" one narrow layer (`core.narrow`). prior: moments of x from
    other proteins, blended in for the first layer (see `core.prior`). Layers that factors would not
    make smaller stay dense.

    >>> x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    >>> head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> small, certificate = compress_head(head, x, rank=2)
    >>> small[0].rank, small(x).shape
    (2, torch.Size([200, 3]))
    """
    request = Request(rank, fvu, speedup, bytes)
    request.check()
    metric = metric or ("output" if fvu is None else "own")
    if metric not in METRICS:
        raise InputError(f"a metric out of {', '.join(METRICS)} required, got {metric!r}")
    if metric in WHOLE and prior is not None:
        raise InputError("no prior required for a whole head, got one; its moments know no output")
    parts = parts_of(head)
    first = next(part for part in parts if isinstance(part, nn.Linear))
    rows = {"fitted": checked_rows(x, first, "data")}
    if held_out is not None:
        rows["held_out"] = checked_rows(held_out, first, "held-out data")
    by_layer = partial(layer_students, of_output=metric == "output", prior=prior)
    fit = {"whole": whole_student, "narrow": narrow_student}.get(metric, by_layer)
    with evaluating(head), torch.no_grad():
        found = fit(parts, rows["fitted"], rows.get("held_out"), request, int8, seed)
        single = isinstance(head, nn.Linear)
        small = found.parts[0] if single else nn.Sequential(*found.parts)
        certificate = certify_head(head, small, found, rows, request.given, metric, seed)
    for part, new in zip(parts, found.parts):
        if metric not in WHOLE and new is not part:
            new.train(part.training)
    small.training = head.training
    return small, certificate


def layer_students(
    parts: list[nn.Module],
    x: Tensor,
    held_out: Tensor | None,
    request: Request,
    int8: bool,
    seed: int,
    of_output: bool,
    prior: Moments | None,
) -> Student:
    """A head as one student of each linear layer."""
    targets, blend = find_targets(parts, x, prior, of_output, request.rank or BLEND_RANK, seed)
    choices = choices_of_ranks(parts, targets, request, int8, of_output)
    small, fitted = fit_best(parts, targets, choices, x, int8)
    return Student(small, certify_layers(parts, small, fitted, held_out, seed), blend)


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
    for part in parts:
        if not isinstance(part, nn.Linear) and any(
            isinstance(m, nn.Linear) for m in part.modules()
        ):
            raise InputError(
                "an nn.Sequential of single layers required, got linear layers inside a"
                f" {type(part).__name__}; put its layers into the head itself"
            )
    return parts


def checked_rows(x: Tensor, first: nn.Linear, what: str) -> Tensor:
    """The rows as the first layer reads them."""
    d_in = first.in_features
    if x.ndim != 2 or x.shape[1] != d_in:
        shape = tuple(x.shape)
        raise InputError(f"{what} of shape (n, {d_in}) required for this layer, got {shape}")
    if len(x) < 2:
        raise InputError(f"at least 2 rows of {what} required, got {len(x)}")
    bad = int((~x.isfinite()).any(1).sum())
    if bad:
        got = f"NaN or infinity in {bad} of {len(x)} rows"
        raise InputError(f"finite {what} required, got {got}; remove them")
    return x.to(first.weight)
