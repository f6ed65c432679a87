"""A head made smaller layer by layer: moments, metric, rank and factors of each linear layer.

Moments come from the activations of the dense head. Of the first layer's inputs few rows may exist:
they are then blended with a prior (see `core.prior`), the user's or, without one, the weight's own.
The loss of a layer's output y is E (y - y')^T G (y - y'), with G the identity, or the mean squared
Jacobian of the rest of the head (Gauss-Newton). A last scaling to unit length is no part of the
rest: losses of all layers are then in units of the raw output and can be shared out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from distil_rank.compress.quantise import module_bytes, quantise
from distil_rank.compress.ranks import Options, allocate, largest_rank, low_rank
from distil_rank.core.certificates import require_linear
from distil_rank.core.errors import InputError
from distil_rank.core.functions import fvu
from distil_rank.core.heads import UnitNorm
from distil_rank.core.linear import LowRankLinear, linear
from distil_rank.core.lowrank import Joint, Optimum, optimum, require_finite, smallest_rank
from distil_rank.core.moments import Moments
from distil_rank.core.prior import Blend, blended_moments, folds_of
from distil_rank.core.randomness import generator

FEW = 4  # rows a feature below which the weight's own prior is tried
PROBES = 8  # random directions a row
TILTS = (1.0, 2.0, 4.0)  # weights of a layer's loss over the next one's, of which one is chosen
Ranks = dict[int, int | None]  # by place; None: dense


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
        return largest_rank(self.layer.in_features, self.layer.out_features)

    def joint(self, reads: Tensor | None = None) -> Joint:
        """Moments of what a student reads (None: what the dense head feeds it), and of the output.

        With inputs that compressed layers have changed, the output stays that of the dense head.
        """
        if reads is None:
            return Joint.of_layer(self.layer.weight, self.layer.bias, Moments.of(self.inputs))
        y = self.layer(self.inputs)
        return Joint.of(Moments.of(torch.cat([reads, y], 1)), self.layer.in_features)


def find_targets(
    parts: Sequence[nn.Module],
    x: Tensor,
    prior: Moments | None,
    of_output: bool,
    rank: int,
    seed: int,
) -> tuple[list[Target], Blend | None]:
    """The linear layers of a head fed with x (n, d_in), and the blend of the first one's moments.

    of_output: whether the metric is that of the head's output. The blend is chosen at `rank`.
    """
    targets: list[Target] = []
    blend = None
    end = len(parts) - isinstance(parts[-1], UnitNorm)
    for i, part in enumerate(parts):
        y = part(x)
        if isinstance(part, nn.Linear):
            moments = Moments.of(x)
            require_linear(part, moments)
            if not targets and (prior is not None or len(x) < FEW * part.in_features):
                moments, blend = blended_moments(part.weight, "input", folds_of(x), prior, rank)
            G, rest = None, parts[i + 1 : end]
            if of_output and any(isinstance(later, nn.Linear) for later in rest):
                G = squared_jacobian(rest, y, generator(seed, "metric", i))
            best = optimum(part.weight, part.bias, moments)
            targets.append(Target(i, part, x, moments, best, G))
        x = y
    return targets, blend


def squared_jacobian(parts: Sequence[nn.Module], y: Tensor, source: torch.Generator) -> Tensor:
    """G = E[J^T J] (d, d), J the derivative of what the parts make of y (n, d).

    By random signs: J^T v with independent signs v has J^T J as its second moment, exactly so for
    one output.
    """
    total = torch.zeros(y.shape[1], y.shape[1], dtype=torch.float64, device=y.device)
    for _ in range(PROBES):
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            result = nn.Sequential(*parts)(leaf)
            v = torch.randint(2, result.shape, generator=source).to(result) * 2 - 1
            (gradient,) = torch.autograd.grad((result * v).sum(), leaf)
        gradient = gradient.double()
        total += gradient.T @ gradient
    return total / (PROBES * len(y))


def choices_of_ranks(
    parts: Sequence[nn.Module],
    targets: Sequence[Target],
    request: Request,
    int8: bool,
    of_output: bool,
) -> list[Ranks]:
    """Ranks that meet the request: one choice, or several of which the rows decide.

    Speed and bytes are shared out by the loss of the head's output, if that is the metric. Its
    second-order estimate makes too little of what early layers lose, hence the tilts.
    """
    if request.rank is not None:
        return [{t.place: request.rank if request.rank <= t.limit else None for t in targets}]
    if request.fvu is not None:
        ranks = {t.place: smallest_rank(t.best.fvu, request.fvu) for t in targets}
        return [{t.place: ranks[t.place] if ranks[t.place] <= t.limit else None for t in targets}]
    others = [part for part in parts if not isinstance(part, nn.Linear)]
    fixed = sum(map(module_bytes, others))  # so do biases, and in eight bits scales of B's rows
    for t in targets:
        fixed += t.layer.out_features * (8 if int8 else t.layer.weight.element_size())
    choices: list[Ranks] = []
    for tilt in TILTS if of_output and len(targets) > 1 else (1.0,):
        weights = [tilt**i if of_output else None for i in reversed(range(len(targets)))]
        options = [
            _options(t, weight, request.bytes is not None, int8)
            for t, weight in zip(targets, weights)
        ]
        if request.speedup is not None:
            budget = sum(float(x.costs[-1]) for x in options) / request.speedup
        else:
            assert request.bytes is not None
            least = fixed + sum(x.costs[0] for x in options)
            if request.bytes < least:
                raise InputError(
                    f"at least {least:.0f} bytes required (rank 1 everywhere), got {request.bytes};"
                    " ask for more"
                )
            budget = request.bytes - fixed
        found = {int(name): rank for name, rank in allocate(options, budget).ranks.items()}
        choices += [] if found in choices else [found]
    return choices


def _options(t: Target, weight: float | None, in_bytes: bool, int8: bool) -> Options:
    """Costs in bytes, or in weights, and losses by rank.

    weight: of the layer's part of the head's squared error; None: its own FVU.
    """
    layer, best = t.layer, t.best
    if weight is not None and t.metric is not None:
        best = optimum(layer.weight, layer.bias, t.moments, metric=t.metric)
    shape, size = (layer.in_features, layer.out_features), layer.weight.element_size()
    each = (1.0, 1.0)
    if in_bytes:  # in eight bits A's rows have scales
        each = (1 + 4 / sum(shape) if int8 else size, size)
    return low_rank(str(t.place), *shape, best.tails.cpu().numpy(), weight, each)


@dataclass(frozen=True)
class Fitted:
    """The student of one layer, what it reads (None: what the dense head feeds it), and in int8."""

    target: Target
    reads: Tensor | None
    student: LowRankLinear | nn.Linear  # dense: refitted where its inputs have changed
    int8: LowRankLinear | None = None


def fit(
    parts: Sequence[nn.Module], targets: Sequence[Target], ranks: Ranks, x: Tensor, int8: bool
) -> tuple[list[nn.Module], list[Fitted]]:
    """Compressed parts in order: each layer imitates the dense one on what really reaches it."""
    small, fitted = [], []
    known, changed = {target.place: target for target in targets}, False
    for i, part in enumerate(parts):
        new = part
        if i in known:
            found = _student(known[i], ranks[i], x if changed else None, int8)
            fitted.append(found)
            new = found.int8 or found.student
            changed = changed or new is not part
        small.append(new)
        x = new(x)
    return small, fitted


def fit_best(
    parts: Sequence[nn.Module],
    targets: Sequence[Target],
    choices: Sequence[Ranks],
    x: Tensor,
    int8: bool,
) -> tuple[list[nn.Module], list[Fitted]]:
    """The fit whose output is nearest to the head's on the rows x (n, d_in)."""
    y = nn.Sequential(*parts)(x)
    fits = [fit(parts, targets, ranks, x, int8) for ranks in choices]
    return min(fits, key=lambda found: fvu(nn.Sequential(*found[0])(x), y))


def _student(t: Target, rank: int | None, reads: Tensor | None, int8: bool) -> Fitted:
    layer, G = t.layer, t.metric
    if rank is None and reads is None:
        return Fitted(t, None, layer)
    trained = layer.weight.requires_grad
    if rank is None:  # a layer that stays dense imitates the teacher's on its changed inputs
        joint = t.joint(reads)
        M, _ = joint.regression(layer.weight)
        bias = joint.output_mean - M @ joint.input_mean
        new = linear(M.to(layer.weight), bias.to(layer.weight)).requires_grad_(trained)
        return Fitted(t, reads, new)
    if reads is None:
        best = t.best if G is None else optimum(layer.weight, layer.bias, t.moments, rank, G)
        inputs = t.moments.mean, t.moments.covariance
    else:
        joint = t.joint(reads)
        best = joint.optimum(layer.weight, metric=G, rank=rank)
        inputs = joint.input_mean, joint.inputs
    student = best.student(rank).to(layer.weight).requires_grad_(trained)
    require_finite(student)
    return Fitted(t, reads, student, quantise(student, *inputs) if int8 else None)
