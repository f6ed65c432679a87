"""What to do with each linear layer of a head: the moments and the metric it is fitted with, and its rank under a request.

Moments come from the activations of the dense head. Of the first layer's inputs few rows may exist: they are then blended with a
prior (see `prior`), the user's or, without one, the weight's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import smallest_rank
from distil_rank.core.prior import FOLDS, Blend, blended_moments
from distil_rank.compress.quantise import module_bytes
from distil_rank.compress.ranks import Layer, allocate
from distil_rank.core.lowrank import Spectrum, metric_root, spectrum_from_inputs
from distil_rank.core.randomness import generator
from distil_rank.core.moments import Moments

PROBES = 8  # random directions a row for the metric
METRICS = ("own", "next", "output")
FEW = 4  # rows a feature below which the weight's own prior is tried


@dataclass(frozen=True)
class Request:
    """How small: exactly one of these."""

    rank: int | None = None  # of every layer
    fvu: float | None = None  # of every layer on its own, at most
    speedup: float | None = None  # FLOPs before / after
    bytes: int | None = None  # of all weights after

    @property
    def given(self) -> dict[str, float]:
        return {k: v for k, v in asdict(self).items() if v is not None}

    def check(self) -> None:
        if len(self.given) != 1:
            raise InputError(f"exactly one of rank, fvu, speedup and bytes required, got {self.given or 'none'}")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")
        if self.fvu is not None and not 0 < self.fvu < 1:
            raise InputError(f"fvu must be between 0 and 1, got {self.fvu}")
        if self.speedup is not None and not 1 < self.speedup < 1e6:
            raise InputError(f"speedup must be above 1, got {self.speedup}")
        if self.bytes is not None and self.bytes < 1:
            raise InputError(f"bytes must be positive, got {self.bytes}")


@dataclass(frozen=True)
class Target:
    """One linear layer of a head and what its student is made from."""

    place: int  # among the parts
    layer: nn.Linear
    inputs: Tensor  # what the dense head feeds it (n, d_in)
    moments: Moments  # of the inputs, blended where that helps
    spectrum: Spectrum
    metric: Tensor | None  # G (d_out, d_out) of the loss of its output; None: the identity

    @property
    def limit(self) -> int:
        """Largest rank whose factors are smaller than the layer."""
        d_in, d_out = self.layer.in_features, self.layer.out_features
        return min(d_in, d_out, (d_in * d_out - 1) // (d_in + d_out))


def find_targets(
    parts: Sequence[nn.Module], x: Tensor, prior: Moments | None, metric: str, rank: int, seed: int
) -> tuple[list[Target], Blend | None]:
    """The linear layers of a head fed with x (n, d_in), and the blend of the first one's moments, chosen at `rank`."""
    places = [i for i, part in enumerate(parts) if isinstance(part, nn.Linear)]
    targets: list[Target] = []
    blend = None
    for i, part in enumerate(parts):
        y = part(x)
        if isinstance(part, nn.Linear):
            moments = Moments.of(x)
            if not targets and (prior is not None or len(x) < FEW * part.in_features):
                folds = [Moments.of(x[f::FOLDS]) for f in range(min(FOLDS, len(x)))]
                moments, blend = blended_moments(part.weight, "input", folds, prior, rank)
            G = None
            if metric != "own" and i < places[-1]:
                following = places[places.index(i) + 1] + 1 if metric == "next" else len(parts)
                G = squared_jacobian(parts[i + 1 : following], y, generator(seed, "metric", i))
            targets.append(Target(i, part, x, moments, spectrum_from_inputs(part.weight, moments), G))
        x = y
    return targets, blend


def choose_ranks(
    parts: Sequence[nn.Module], targets: Sequence[Target], request: Request, int8: bool, whole: bool
) -> dict[int, int | None]:
    """Rank of every linear part, None where it stays dense; whole: shared out by the loss of the head's output."""
    if request.rank is not None or request.fvu is not None:
        ranks = {t.place: request.rank or _rank_for(t, request.fvu) for t in targets}
        return {t.place: ranks[t.place] if ranks[t.place] <= t.limit else None for t in targets}
    if request.speedup is not None:
        table = [_row(t, whole, (1, 1)) for t in targets]
        found = allocate(table, sum(row.dense_cost for row in table) / request.speedup)
    else:
        assert request.bytes is not None
        fixed = sum(module_bytes(part) for part in parts if not isinstance(part, nn.Linear))
        table = []
        for t in targets:
            size, shape = t.layer.weight.element_size(), t.layer.in_features + t.layer.out_features
            fixed += t.layer.out_features * (4 + 4 if int8 else size)  # the bias, and the scales of B's rows
            table.append(_row(t, whole, (1 + 4 / shape, size) if int8 else (size, size)))
        least = fixed + sum(min(row.rank_cost, row.dense_cost) for row in table)
        if request.bytes < least:
            raise InputError(
                f"at least {least:.0f} bytes required (rank 1 everywhere), got {request.bytes}; ask for more"
            )
        found = allocate(table, request.bytes - fixed)
    return {int(name): rank for name, rank in found.ranks.items()}


def _rank_for(target: Target, fvu: float | None) -> int:
    assert fvu is not None
    return smallest_rank(target.spectrum.tails / max(target.spectrum.variance, 1e-300), fvu)


def _row(target: Target, whole: bool, bytes: tuple[float, float]) -> Layer:
    """The layer's loss by rank: its own FVU, or as a part of the head's squared error (the last layer's own is that)."""
    spectrum, W = target.spectrum, target.layer.weight
    if target.metric is not None and whole:
        spectrum = spectrum_from_inputs(metric_root(target.metric) @ W.double(), target.moments)
    shape = target.layer.in_features, target.layer.out_features
    return Layer(str(target.place), *shape, spectrum.tails.numpy(), 1.0 if whole else None, bytes=bytes)


def squared_jacobian(parts: Sequence[nn.Module], y: Tensor, source: torch.Generator) -> Tensor:
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
