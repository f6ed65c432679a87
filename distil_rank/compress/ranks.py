"""Ranks for many layers under one budget, with a Lagrange certificate of how good the choice is.

A layer at rank r loses its weight times sum_{i>r} lambda_i and costs r (d_in + d_out) parameters;
left dense it loses nothing and costs d_in d_out. The layers of an MLP may instead keep k neurons
(`neurons`). The total loss is minimized: every layer or MLP takes its best option at one price of a
parameter, and then what could still be better is searched. For every mu >= 0

    min loss  >=  sum_l min_o [ loss_l(o) + mu cost_l(o) ] - mu budget   (weak duality)

so the right-hand side certifies what no choice of options o under the budget can beat. An option
whose term exceeds the least one by more than the gap between loss and bound is in no better choice.
Few options are left, and a search over their sums is exact, unless it would have to keep more than
WIDEST of them: then the first choice stands, with its gap. A layer whose factors would cost as much
as the dense layer stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distil_rank.compress.sites import Site
from distil_rank.core.errors import InputError

WIDEST = 20_000  # partial choices that the exact search keeps
Array = NDArray[np.float64]
Ranks = dict[str, int | None]  # by layer; None: dense, of all neurons or some
Asked = int | Mapping[str, int | None]  # one rank for all layers, or by name
Pick = tuple[Ranks, dict[str, int]]  # ranks by layer, and neurons kept by MLP


class Options(NamedTuple):
    """What a layer or an MLP can become: costs rise, losses fall."""

    costs: Array
    losses: Array
    picks: list[Pick]


def low_rank(
    name: str,
    d_in: int,
    d_out: int,
    tails: Array,
    weight: float | None = None,
    bytes: tuple[float, float] = (1.0, 1.0),
) -> Options:
    """A layer at every rank whose factors are smaller, or dense.

    tails: loss at rank 0, 1, ... k (k + 1,). weight: of that loss; None: 1 / variance, for a sum of
    FVUs. bytes: of a number in the factors and in the dense layer.
    """
    if weight is None:
        weight = 1 / float(tails[0]) if tails[0] > 0 else 0.0
    ranks = np.arange(1, min(largest_rank(d_in, d_out), len(tails) - 1) + 1)
    costs = np.append(ranks * ((d_in + d_out) * bytes[0]), d_in * d_out * bytes[1])
    picks: list[Pick] = [({name: r}, {}) for r in [*ranks.tolist(), None]]
    return Options(costs, np.append(weight * tails[ranks], 0.0), picks)


def or_neurons(layers: Sequence[Options], name: str, width: int, losses: Array) -> Options:
    """Layers of MLP `name`: each at a rank of its own, or dense with k of `width` neurons.

    losses: with 0, 1, ... neurons.
    """
    found = reduce(_both, layers)
    dense = Ranks.fromkeys(found.picks[0][0])
    kept = np.arange(1, len(losses))
    costs = np.append(found.costs, kept * sum(float(x.costs[-1]) for x in layers) / width)
    losses = np.append(found.losses, losses[1:])
    picks = [*found.picks, *((dense, {name: k}) for k in kept.tolist())]
    order = _front(costs, losses)
    return Options(costs[order], losses[order], [picks[i] for i in order])


def _both(a: Options, b: Options) -> Options:
    """Options of two layers together, without those that another one beats."""
    costs, losses = (np.add.outer(x, y).ravel() for x, y in zip(a[:2], b[:2]))
    order = _front(costs, losses)
    pairs = (divmod(i, len(b.costs)) for i in order.tolist())
    return Options(
        costs[order], losses[order], [_merged([a.picks[i], b.picks[j]]) for i, j in pairs]
    )


def _merged(picks: Sequence[Pick]) -> Pick:
    ranks = {name: rank for pick in picks for name, rank in pick[0].items()}
    return ranks, {name: kept for pick in picks for name, kept in pick[1].items()}


def _front(costs: Array, losses: Array) -> NDArray[np.int64]:
    """Indices, by rising cost, of what nothing else beats in both."""
    order = np.lexsort((losses, costs))
    least = np.minimum.accumulate(losses[order])
    return order[np.r_[True, losses[order][1:] < least[:-1]]] if len(order) else order


@dataclass(frozen=True)
class Allocation:
    """Rank by layer, neurons by MLP, and how far from the best choice it can be."""

    ranks: Ranks
    neurons: dict[str, int]
    budget: float
    cost: float
    loss: float  # sum of the weighted losses
    bound: float  # no choice of these options under this budget loses less
    multiplier: float  # loss saved by one more parameter

    @property
    def gap(self) -> float:
        """Relative distance to the bound, 0 where the choice is proven best."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0

    def record(self) -> dict[str, float]:
        """The certificate, without the ranks."""
        names = ("budget", "cost", "loss", "bound", "gap", "multiplier")
        return {name: float(getattr(self, name)) for name in names}


def largest_rank(d_in: int, d_out: int) -> int:
    """Largest rank whose factors are smaller than the dense layer; 0 where there is none."""
    return (d_in * d_out - 1) // (d_in + d_out)


def given(sites: Sequence[Site], asked: Asked) -> Ranks:
    """The ranks asked for; None where factors would not be smaller."""
    chosen: Ranks = {}
    for site in sites:
        rank = asked if isinstance(asked, int) else asked.get(site.name)
        if rank is not None and rank < 1:
            raise InputError(f"a rank of at least 1 required, got {rank} for layer {site.name}")
        fits = rank is not None and rank <= largest_rank(site.d_in, site.d_out)
        chosen[site.name] = rank if fits else None
    return chosen


def allocate(options: Sequence[Options], budget: float) -> Allocation:
    """Choose an option of every layer or MLP: the total cost stays within `budget`, and the total
    loss is least, up to the gap that the result states.
    """
    floor = sum(x.costs[0] for x in options)
    if budget < floor:
        raise InputError(
            f"a budget of at least {floor:.0f} (rank 1 everywhere) required, got {budget:.0f};"
            " ask for less"
        )

    def total(chosen: Sequence[int]) -> float:
        return sum(float(x.losses[i]) for i, x in zip(chosen, options))

    chosen, bound, multiplier = relaxed(options, budget)
    better = _exact(options, budget, multiplier, (total(chosen) - bound) * (1 + 1e-9))
    chosen = min(chosen, better or chosen, key=total)
    cost, loss = sum(float(x.costs[i]) for i, x in zip(chosen, options)), total(chosen)
    picked = _merged([x.picks[i] for i, x in zip(chosen, options)])
    return Allocation(*picked, budget, cost, loss, min(bound, loss), multiplier)


def relaxed(options: Sequence[Options], budget: float) -> tuple[list[int], float, float]:
    """Options within the budget, the best Lagrange bound on any, and its multiplier.

    The multiplier is bisected: where every layer takes its best option at that price of a
    parameter, the cost falls as the price rises. The dual is concave with its maximum where the
    cost passes the budget. What the choice leaves of the budget buys costlier options.
    """

    def at(mu: float) -> tuple[list[int], float, float]:
        """The cheapest best option of each layer, their cost, and the dual."""
        best = [int((x.losses + mu * x.costs).argmin()) for x in options]
        spent = sum(float(x.costs[i]) for i, x in zip(best, options))
        lost = sum(float(x.losses[i]) for i, x in zip(best, options))
        return best, spent, lost + mu * (spent - budget)

    steps = [(x.losses[0] - x.losses[1:]) / (x.costs[1:] - x.costs[0]) for x in options]
    low, high = 0.0, 2 * max((float(step.max()) for step in steps if len(step)), default=0.0)
    if at(low)[1] <= budget:
        high = low
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if at(middle)[1] <= budget else (middle, high)
    (chosen, spent, bound), (upper, _, other) = at(high), at(low)
    left = budget - spent
    for i in sorted(range(len(options)), key=lambda i: chosen[i] - upper[i]):
        costs = options[i].costs
        last = int(np.searchsorted(costs, costs[chosen[i]] + left, "right")) - 1
        left -= costs[last] - costs[chosen[i]]
        chosen[i] = last
    return chosen, max(bound, other), high


def _exact(options: Sequence[Options], budget: float, mu: float, gap: float) -> list[int] | None:
    """The best choice, by a search over what a known one within `gap` of the bound allows."""
    costs, losses, excess = np.zeros(1), np.zeros(1), np.zeros(1)
    taken: list[NDArray[np.int64]] = []  # of each layer: parent and option
    for option in options:
        extra = option.losses + mu * option.costs
        extra = extra - extra.min()
        sums = (excess[:, None] + extra).ravel()
        fits = (costs[:, None] + option.costs).ravel() <= budget
        kept = np.flatnonzero((sums <= gap) & fits)
        excess, costs, losses = (
            np.add.outer(a, b).ravel()[kept]
            for a, b in ((excess, extra), (costs, option.costs), (losses, option.losses))
        )
        order = _front(costs, losses)  # of partial choices, those that cost or lose less
        if not 0 < len(order) <= WIDEST:
            return None
        excess, costs, losses = excess[order], costs[order], losses[order]
        taken.append(kept[order])
    best = int(losses.argmin())
    found: list[int] = []
    for chosen, option in zip(reversed(taken), reversed(options)):
        best, index = divmod(int(chosen[best]), len(option.costs))
        found.insert(0, index)
    return found
