"""The best linear student of any function in closed form, and what it lost to linearity and rank.

The teacher is a function f of a row x: a head of several layers, or anything else. Its students of
every rank come from the moments of [x, f(x)] (`lowrank.Joint`): y = B A x + b, the reduced-rank
regression of f(x) on x. Few rows determine it badly. Where f has derivatives, it is therefore drawn
to the mean Jacobian T of f over some of the rows: for Gaussian x both are the same map, because
Cov(f(x), x) S^-1 = E J(x) (Stein's lemma). How much is chosen by cross-validation. For a linear f
the mean Jacobian is f, and the student is the optimum of the layer.

Further rows may be drawn and labeled by f: mixtures of two rows, with Gaussian noise of the rows'
shrunk covariance. Their share and the width of the noise are chosen on rows kept aside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.linear import LowRankLinear, check_rank
from distil_rank.core.lowrank import Joint, floor_fvu, require_finite
from distil_rank.core.moments import Moments
from distil_rank.core.prior import folds_of, merged
from distil_rank.core.randomness import generator

RIDGES = (1e-7, 1e-4, 1e-2, 1e-1, 1.0, math.inf)  # 1e-7: as small as float64 allows
MIXES = ((0.0, 0.0), (0.5, 0.3), (0.5, 1.0), (0.9, 0.3), (0.9, 1.0))  # share of drawn rows, width
FOLDS = 3
DERIVED = 64  # rows whose mean Jacobian is taken
DRAWN = 4096  # rows drawn
LINEAR = 1e-10  # of the variance: what rounding leaves of a linear f
BATCH = 4096
CHECKED = 8  # rows that f computes twice

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FunctionCertificate:
    """Loss of a linear student of a function, measured on the function's own outputs, in FVU."""

    rank: int
    rows: int
    achieved_fvu: float  # of the student as stored
    linear_fvu: float  # of the same map without the cut in rank: lost to linearity
    floor_fvu: float  # no student with an r-wide bottleneck, linear or not, is below on these rows
    inputs: str  # data, or drawn
    share: float  # of drawn rows among those fitted
    width: float  # of their noise, in standard deviations
    ridge: float | None  # draws the map to the mean Jacobian; None: that alone
    held_out_rows: int | None = None
    held_out_achieved_fvu: float | None = None
    held_out_linear_fvu: float | None = None
    held_out_floor_fvu: float | None = None

    @property
    def rank_fvu(self) -> float:
        """Lost to the cut in rank, on the fitted rows."""
        return self.achieved_fvu - self.linear_fvu


def distill_function(
    f: Function,
    x: Tensor,
    rank: int,
    inputs: str = "data",
    held_out: Tensor | None = None,
    seed: int = 0,
) -> tuple[LowRankLinear, FunctionCertificate]:
    """Best linear student of f: (n, d_in) -> (n, d_out) at `rank`, fitted on rows x (n, d_in).

    f is deterministic and treats every row by itself. inputs: "data", or "drawn" for further rows
    labeled by f. held_out: rows to measure on.

    >>> x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    >>> head = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    >>> student, certificate = distill_function(head, x, rank=4)
    >>> student.rank, certificate.floor_fvu < certificate.achieved_fvu < 1
    (4, True)
    """
    if inputs not in ("data", "drawn"):
        raise InputError(f"inputs 'data' or 'drawn' required, got {inputs!r}")
    y = outputs(f, x)
    check_rank(rank, min(x.shape[1], y.shape[1]))
    parts = folds_of(torch.cat([x, y], 1), FOLDS)
    fitted = merged(parts)
    T = mean_jacobian(f, x, y.shape[1], seed)
    (share, width), ridge = (0.0, 0.0), math.inf
    joint = Joint.of(fitted, x.shape[1])
    if not _is(T, joint):
        (share, width), ridge = _choose(f, x, parts, T, rank, inputs, seed)
        mixed = _mixed(f, x, fitted, share, width, seed)
        joint = Joint.of(mixed, x.shape[1])
    best = joint.optimum(T, ridge)
    student, whole = (best.student(r, y.dtype) for r in (rank, len(best.eigenvalues)))
    student.to(x.device).eval()
    fields = _measured(x, y, student, whole)
    if held_out is not None:
        held = _measured(held_out, outputs(f, held_out), student, whole)
        fields |= {f"held_out_{name}": value for name, value in held.items()}
    found = None if ridge == math.inf else ridge
    choice = {"inputs": inputs, "share": share, "width": width, "ridge": found}
    return student, FunctionCertificate(rank, **fields, **choice)  # type: ignore[arg-type]


def outputs(f: Function, x: Tensor) -> Tensor:
    """f(x) (n, d_out), finite; InputError unless f treats each row by itself, twice alike."""
    if x.ndim != 2 or len(x) < 2 or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise InputError(
            f"at least 2 finite rows (n, d_in) required, got {x.dtype} {tuple(x.shape)}"
        )
    with torch.no_grad():
        pieces = [f(rows) for rows in x.split(BATCH)]
        again = f(x[-CHECKED:])
    y = torch.cat(pieces) if all(p.ndim for p in pieces) else pieces[0]
    if y.ndim != 2 or len(y) != len(x) or not bool(y.isfinite().all()):
        raise InputError(f"finite outputs ({len(x)}, d_out) of f required, got {tuple(y.shape)}")
    close = torch.finfo(y.dtype).eps ** 0.5 * y.abs().max()
    if not bool(((y[-CHECKED:] - again).abs() <= close).all()):
        raise InputError(
            "a deterministic function of one row at a time required, got other outputs for the"
            " same rows; put it in evaluation mode"
        )
    return y


def mean_jacobian(f: Function, x: Tensor, d_out: int, seed: int = 0) -> Tensor:
    """Mean of df/dx (d_out, d_in) over some rows, float64; zeros where f has no derivatives."""
    chosen = torch.randperm(len(x), generator=generator(seed, "Jacobian rows"))[:DERIVED]
    with torch.enable_grad():
        step = torch.zeros_like(x[:1], requires_grad=True)
        y = f(x[chosen.to(x.device)] + step).mean(0)
        if not y.requires_grad:
            return torch.zeros(d_out, x.shape[1], dtype=torch.float64, device=x.device)
        gradients = [torch.autograd.grad(y[i], step, retain_graph=True)[0] for i in range(d_out)]
    return torch.cat(gradients).double()


def _is(T: Tensor, joint: Joint) -> bool:
    """Whether f is linear: T x + b, but for rounding."""
    missed = joint.outputs.trace() + ((T @ joint.inputs - 2 * joint.cross) * T).sum()
    return float(missed) <= LINEAR * float(joint.outputs.trace())


def drawn_rows(x: Tensor, width: float, count: int, seed: int) -> Tensor:
    """Mixtures of two rows of x (n, d) plus noise of `width` standard deviations (count, d)."""
    source = generator(seed, "drawn inputs", round(1000 * width))
    first, second = torch.randint(len(x), (2, count), generator=source).to(x.device)
    part = torch.rand(count, 1, generator=source, dtype=torch.float64).to(x.device)
    rows = x.double()
    centered = rows - rows.mean(0)
    n, d = x.shape
    mean = float(centered.square().mean())
    # oracle-approximating shrinkage (Chen et al., IEEE Trans. Signal Process. 58, 2010); the mean
    # square of the covariance from the smaller of the two products
    small = centered if n < d else centered.T
    square = float((small @ small.T / n).square().sum()) / d**2
    shrunk = min(1.0, (square + mean**2) / max((n + 1) * (square - mean**2 / d), 1e-300))
    weights = torch.randn(count, n, generator=source, dtype=torch.float64).to(x.device)
    noise = (1 - shrunk) ** 0.5 * (weights @ centered) / n**0.5
    other = torch.randn(count, d, generator=source, dtype=torch.float64).to(x.device)
    noise = noise + (shrunk * mean) ** 0.5 * other
    mixed = part * rows[first] + (1 - part) * rows[second] + width * noise
    return mixed.to(x)


def _mixed(f: Function, x: Tensor, own: Moments, share: float, width: float, seed: int) -> Moments:
    """Moments of the rows of x and of drawn rows, which count as their share."""
    if share == 0:
        return own
    rows = drawn_rows(x, width, DRAWN, seed)
    drawn = Moments.of(torch.cat([rows, outputs(f, rows)], 1))
    count = own.count * share / (1 - share)
    return Moments.given(count, drawn.mean, count * drawn.covariance).merge(own)


def _choose(
    f: Function,
    x: Tensor,
    parts: list[Moments],
    T: Tensor,
    rank: int,
    inputs: str,
    seed: int,
) -> tuple[tuple[float, float], float]:
    """(share, width) and ridge by cross-validation over the folds of the real rows."""
    if len(x) < 2 * FOLDS:
        return MIXES[0], 1.0
    held = [Joint.of(part, x.shape[1]) for part in parts]
    own = [merged(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
    fold = torch.arange(len(x), device=x.device) % len(parts)

    def losses(mix: tuple[float, float], ridges: Sequence[float]) -> list[float]:
        total = torch.zeros(len(ridges), dtype=torch.float64)
        for i, (moments, left) in enumerate(zip(own, held)):
            joint = Joint.of(_mixed(f, x[fold != i], moments, *mix, seed), x.shape[1])
            for j, ridge in enumerate(ridges):
                student = joint.optimum(T, ridge, rank=rank).student(rank)
                total[j] += left.fvu(student) * left.rows
        return total.tolist()

    found = losses(MIXES[0], RIDGES)
    mix, ridge = MIXES[0], RIDGES[found.index(min(found))]
    if inputs == "drawn":
        scores = [losses(mix, [ridge])[0] for mix in MIXES]
        mix = MIXES[scores.index(min(scores))]
        found = losses(mix, RIDGES)
        ridge = RIDGES[found.index(min(found))]
    return mix, ridge


def _measured(
    x: Tensor, y: Tensor, student: LowRankLinear, whole: LowRankLinear
) -> dict[str, float]:
    require_finite(student)
    with torch.no_grad():
        achieved, linear = (fvu(s(x), y) for s in (student, whole))
    floor = floor_fvu(Moments.of(y).covariance, student.rank)
    return {"rows": len(x), "achieved_fvu": achieved, "linear_fvu": linear, "floor_fvu": floor}


def fvu(found: Tensor, y: Tensor) -> float:
    """Mean squared error of `found` (n, d) over the variance of y (n, d)."""
    y = y.double()
    variance = float((y - y.mean(0)).square().sum())
    return float((found.double() - y).square().sum()) / variance if variance > 0 else 0.0
