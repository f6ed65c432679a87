"""Every class of students of a head at several sizes, and what each keeps of the head's function.

Sizes are weights (or bytes, of students in eight bits) before over after. The floor is what the
outputs themselves keep when cut to the rank that the size allows: a bound on the error of every
student with a bottleneck that narrow, before a last scaling to unit length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from distil_rank.compress.head_certificate import flops, fvu_interval
from distil_rank.compress.head_function import split
from distil_rank.compress.heads import compress_head, parts_of
from distil_rank.compress.quantise import QuantLinear, module_bytes
from distil_rank.compress.sites import evaluating
from distil_rank.compress.tasks import choose_metric, load_labels, task_change
from distil_rank.core.agreement import function_kept, measure_for
from distil_rank.core.errors import InputError
from distil_rank.core.heads import UnitNorm
from distil_rank.core.lowrank import leading_eigenpairs
from distil_rank.core.moments import Moments
from distil_rank.core.narrow import NarrowCertificate
from distil_rank.core.records import Metric

LAYERS, OUTPUT, MAP = "layer by layer", "layer by layer, output metric", "one map"
NARROW, MAP_INT8, INT8, FLOOR = "one narrow layer", "one map, int8", "dense int8", "floor"
METRICS = {LAYERS: "own", OUTPUT: "output", MAP: "whole", NARROW: "narrow", MAP_INT8: "whole"}
FORMS = (*METRICS, INT8, FLOOR)


class Student(TypedDict, total=False):
    """One student; `asked` and `ranks` where a size was asked for, `task` where labels are."""

    student: str
    asked: float
    weights_ratio: float
    bytes_ratio: float
    ranks: list[int | None]
    bent: int  # of a narrow layer's features
    kept: Metric
    fvu: Metric
    task: Metric


class Comparison(TypedDict, total=False):
    """A head, its students, and beside labels its own score."""

    measure: str  # of what is kept: spearman, top1 or neighbors
    n_train: int
    n_val: int
    weights: int
    task: str
    dense: Metric
    students: list[Student]


def compare(
    head: nn.Sequential,
    x: Tensor,
    val: Tensor,
    labels_of_val: Path | None = None,
    ratios: Sequence[float] = (2, 4, 8, 16),
    forms: Sequence[str] = FORMS,
) -> Comparison:
    """Students of `head`, in float32, fitted on x (n, d_in) and measured on val."""
    head = copy.deepcopy(head).float()
    parts = parts_of(head)
    labels = None if labels_of_val is None else load_labels(labels_of_val, len(val))
    with evaluating(head), torch.no_grad():
        x, val = (rows.to(next(head.parameters()).device, torch.float32) for rows in (x, val))
        y = head(val)
        measure = measure_for(y.shape[1], isinstance(parts[-1], UnitNorm))
        found: Comparison = {"measure": measure, "n_train": len(x), "n_val": len(val)}
        found["weights"] = flops(parts)
        if labels is not None:
            found["task"] = choose_metric(y.shape[1], labels)[0]
            found["dense"] = task_change(y, y, labels).before
        found["students"] = []
        for student, outputs in _students(parts, x, val, ratios, forms):
            student["kept"] = function_kept(y, outputs, measure)
            student["fvu"] = fvu_interval(y, outputs, 0)
            if labels is not None:
                student["task"] = task_change(y, outputs, labels).after
            found["students"].append(student)
    return found


def _students(
    parts: list[nn.Module], x: Tensor, val: Tensor, ratios: Sequence[float], forms: Sequence[str]
) -> Iterator[tuple[Student, Tensor]]:
    """Each student with its outputs on held-out rows."""
    head, before = nn.Sequential(*parts), module_bytes(nn.Sequential(*parts))
    for form in [form for form in forms if form in METRICS]:
        known: list[list[int | None]] = []  # a map of one output has rank 1 at any size
        for ratio in ratios:
            eight = form == MAP_INT8
            size = {"bytes": int(before / ratio)} if eight else {"speedup": ratio}
            try:
                small, found = compress_head(head, x, val, metric=METRICS[form], int8=eight, **size)  # type: ignore[arg-type]
            except InputError:  # no such student is that small
                continue
            ranks = [layer.rank for layer in found.layers]
            if ranks not in known:
                known.append(ranks)
                sizes = found.flops_ratio, before / found.bytes_after
                student = _student(form, *sizes) | {"asked": ratio, "ranks": ranks}
                if isinstance(found.function, NarrowCertificate):
                    student["bent"] = found.function.bent
                yield student, small(val)
    if INT8 in forms:
        small = nn.Sequential(*(_eight_bits(part) for part in parts))
        yield _student(INT8, 1.0, before / module_bytes(small)), small(val)
    if FLOOR in forms:
        first, f, last = split(parts)
        y = f(first(val)).double()
        for ratio in ratios:
            each = val.shape[1] + y.shape[1]
            rank = int(flops(parts) / ratio) // each
            if 1 <= rank <= y.shape[1]:
                mean, U = y.mean(0), leading_eigenpairs(Moments.of(y).covariance, rank)[1]
                best = (mean + (y - mean) @ U @ U.T).to(val.dtype)
                size = flops(parts) / rank / each
                yield _student(FLOOR, size, size) | {"asked": ratio, "ranks": [rank]}, last(best)


def _student(form: str, weights: float, bytes: float) -> Student:
    return {"student": form, "weights_ratio": weights, "bytes_ratio": bytes}


def _eight_bits(part: nn.Module) -> nn.Module:
    return QuantLinear.of(part.weight, part.bias) if isinstance(part, nn.Linear) else part
