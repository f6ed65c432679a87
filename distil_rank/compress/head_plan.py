"""What to do with each linear layer of a head: its moments, its metric, and its rank on request.

Moments come from the activations of the dense head. Of the first layer's inputs few rows may exist:
they are then blended with a prior (see `core.prior`), the user's or, without one, the weight's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from distil_rank.compress.head_metrics import METRICS
from distil_rank.compress.quantise import module_bytes
from distil_rank.compress.ranks import Layer, allocate
from distil_rank.core.certificates import require_linear
from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import Optimum, optimum, smallest_rank
from distil_rank.core.moments import Moments
from distil_rank.core.prior import Blend, blended_moments, folds_of
from distil_rank.core.randomness import generator

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
            got = self.given or "none"
            raise InputError(f"exactly one of rank, fvu, speedup and bytes required, got {got}")
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
    best: Optimum  # for the layer's own output
    metric: Tensor | None  # G (d_out, d_out) of the loss of its output; None: the identity

    @property
    def limit(self) -> int:
        """Largest rank whose factors are smaller than the layer."""
        d_in, d_out = self.layer.in_features, self.layer.out_features
        return min(d_in, d_out, (d_in * d_out - 1) // (d_in + d_out))


def find_targets(
    parts: Sequence[nn.Module],
    x: Tensor,
    prior: Moments | None,
    metric: str,
    rank: int,
    seed: int,
) -> tuple[list[Target], Blend | None]:
    """The linear layers of a head fed with x (n, d_in), and the blend of the first one's moments.

    The blend is chosen at `rank`.
    """
    targets: list[Target] = []
    blend = None
    for i, part in enumerate(parts):
        y = part(x)
        if isinstance(part, nn.Linear):
            moments = Moments.of(x)
            require_linear(part, moments)
            if not targets and (prior is not None or len(x) < FEW * part.in_features):
                moments, blend = blended_moments(part.weight, "input", folds_of(x), prior, rank)
            G = METRICS[metric](parts[i + 1 :], y, generator(seed, "metric", i))
            best = optimum(part.weight, part.bias, moments)
            targets.append(Target(i, part, x, moments, best, G))
        x = y
    return targets, blend


def choose_ranks(
    parts: Sequence[nn.Module], targets: Sequence[Target], request: Request, int8: bool, whole: bool
) -> dict[int, int | None]:
    """Rank of every linear part, None where it stays dense.

    whole: speed or bytes are shared out by the loss of the head's output.
    """
    if request.rank is not None:
        return {t.place: request.rank if request.rank <= t.limit else None for t in targets}
    if request.fvu is not None:
        ranks = {t.place: smallest_rank(t.best.fvu, request.fvu) for t in targets}
        return {t.place: ranks[t.place] if ranks[t.place] <= t.limit else None for t in targets}
    if request.speedup is not None:
        table = [_row(t, whole, (1, 1)) for t in targets]
        found = allocate(table, sum(row.dense_cost for row in table) / request.speedup)
        return {int(name): rank for name, rank in found.ranks.items()}
    assert request.bytes is not None
    fixed = sum(module_bytes(part) for part in parts if not isinstance(part, nn.Linear))
    table = []
    for t in targets:
        size, shape = t.layer.weight.element_size(), t.layer.in_features + t.layer.out_features
        # the bias, and the scales of B's rows
        fixed += t.layer.out_features * (4 + 4 if int8 else size)
        table.append(_row(t, whole, (1 + 4 / shape, size) if int8 else (size, size)))
    least = fixed + sum(min(row.rank_cost, row.dense_cost) for row in table)
    if request.bytes < least:
        raise InputError(
            f"at least {least:.0f} bytes required (rank 1 everywhere), got {request.bytes};"
            " ask for more"
        )
    found = allocate(table, request.bytes - fixed)
    return {int(name): rank for name, rank in found.ranks.items()}


def _row(target: Target, whole: bool, bytes: tuple[float, float]) -> Layer:
    """The layer's loss by rank: its own FVU, or its part of the head's squared error."""
    layer, best = target.layer, target.best
    if whole and target.metric is not None:
        best = optimum(layer.weight, layer.bias, target.moments, metric=target.metric)
    importance = 1.0 if whole else None
    shape = layer.in_features, layer.out_features
    return Layer(str(target.place), *shape, best.tails.cpu().numpy(), importance, bytes=bytes)
