"""Ranks for many layers under one budget, with a Lagrange certificate of how good the choice is.

Layer l at rank r loses importance_l * sum_{i>r} lambda_{l,i} and costs r (d_in + d_out) parameters;
left dense it loses nothing and costs d_in d_out. `budget` minimizes the total loss: every layer
takes its best option at one price of a parameter, or uniform ranks where those are better, and then
what could still be better is searched. For every mu >= 0

    min_ranks loss(ranks)  >=  sum_l min_r [ loss_l(r) + mu cost_l(r) ] - mu budget   (weak duality)

so the right-hand side certifies what no choice of ranks under the budget can beat. An option of a
layer whose term exceeds the layer's least one by more than the gap between loss and bound is in no
better choice. Few options are left, and a search over their sums is exact, unless it would have to
keep more than WIDEST of them: then the best so far stands, with its gap. A layer whose factors
would cost as much as the dense layer stays dense, whatever the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distil_rank.compress.sites import Site
from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import Optimum

METHODS = ("uniform", "budget")
WIDEST = 20_000  # partial choices that the exact search keeps
Array = NDArray[np.float64]
Ranks = list[int | None]  # one a layer; None: dense
Asked = int | Mapping[str, int | None]  # one rank for all layers, or by name


@dataclass(frozen=True)
class Layer:
    """What the allocation needs of one layer."""

    name: str
    d_in: int
    d_out: int
    tails: Array  # sum_{i>r} lambda_i for r = 0 ... k (k + 1,): the loss at each rank
    importance: float | None = None  # of its loss; None: 1 / variance, for a sum of FVUs
    bytes: tuple[float, float] = (1.0, 1.0)  # of a number in the factors and in the dense layer

    @property
    def rank_cost(self) -> float:
        return (self.d_in + self.d_out) * self.bytes[0]

    @property
    def dense_cost(self) -> float:
        return self.d_in * self.d_out * self.bytes[1]

    @property
    def limit(self) -> int:
        """Largest rank whose factors are smaller than the dense layer; 0 where there is none."""
        return min(largest_rank(self.d_in, self.d_out), len(self.tails) - 1)

    @property
    def variance(self) -> float:
        return float(self.tails[0])

    @property
    def losses(self) -> Array:
        """Weighted loss at rank 0, 1, ... k."""
        weight = self.importance
        if weight is None:
            weight = 1 / self.variance if self.variance > 0 else 0.0
        return weight * self.tails

    def cost(self, rank: int | None) -> float:
        return self.dense_cost if rank is None else rank * self.rank_cost

    def loss(self, rank: int | None) -> float:
        return 0.0 if rank is None else float(self.losses[rank])


@dataclass(frozen=True)
class Allocation:
    """Rank by layer name (None: dense), and how far from the best choice it can be."""

    ranks: dict[str, int | None]
    budget: float
    cost: float
    loss: float  # sum of the weighted losses
    bound: float  # no choice of ranks under this budget loses less
    multiplier: float  # loss saved by one more parameter

    @property
    def gap(self) -> float:
        """Relative distance to the bound, 0 where the choice is proven best."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0

    def record(self) -> dict[str, float]:
        """The certificate, without the ranks."""
        names = ("budget", "cost", "loss", "bound", "gap", "multiplier")
        return {name: float(getattr(self, name)) for name in names}


def largest_rank(d_in: int, d_out: int, never_slower: bool = True) -> int:
    """Largest rank worth solving for: with factors smaller than the dense layer, or any."""
    smaller = (d_in * d_out - 1) // (d_in + d_out) if never_slower else d_in * d_out
    return min(smaller, d_in, d_out)


def allocated(
    sites: Sequence[Site],
    solved: Mapping[str, Optimum],
    ratio: float,
    method: str,
    importance: float | None,
) -> Allocation:
    """Ranks of a model's layers at this ratio of their cost; layers not solved stay dense."""
    layers = []
    for s in sites:
        tails = solved[s.name].tails.cpu().numpy() if s.name in solved else np.zeros(1)
        layers.append(Layer(s.name, s.d_in, s.d_out, tails, importance))
    return allocate(layers, ratio * sum(layer.dense_cost for layer in layers), method)


def given(sites: Sequence[Site], asked: Asked, never_slower: bool) -> dict[str, int | None]:
    """The ranks asked for, at most full; None where factors would not be smaller."""
    chosen: dict[str, int | None] = {}
    for site in sites:
        rank = asked if isinstance(asked, int) else asked.get(site.name)
        if rank is not None and rank < 1:
            raise InputError(f"a rank of at least 1 required, got {rank} for layer {site.name}")
        rank = None if rank is None else min(rank, site.d_in, site.d_out)
        fits = rank is not None and rank <= largest_rank(site.d_in, site.d_out, never_slower)
        chosen[site.name] = rank if fits else None
    return chosen


def allocate(layers: Sequence[Layer], budget: float, method: str = "budget") -> Allocation:
    """Choose the rank of every layer so that the total cost stays within `budget`.

    `uniform`: every layer keeps the same fraction of its parameters; `budget`: the total weighted
    loss is least, up to the gap that the result states.
    """
    if method not in METHODS:
        raise InputError(f"a method out of {', '.join(METHODS)} required, got {method!r}")
    floor = sum(min(layer.rank_cost, layer.dense_cost) for layer in layers)
    if budget < floor:
        raise InputError(
            f"a budget of at least {floor:.0f} (rank 1 everywhere) required, got {budget:.0f};"
            " ask for less"
        )
    found, bound, multiplier = relaxed(layers, budget)
    chosen = _uniform(layers, budget)
    if method == "budget":
        chosen = min(found, chosen, key=lambda ranks: _loss(layers, ranks))
        chosen = _exact(layers, budget, chosen, multiplier, bound)
    cost = sum(layer.cost(r) for layer, r in zip(layers, chosen))
    loss = _loss(layers, chosen)
    ranks = {layer.name: rank for layer, rank in zip(layers, chosen)}
    return Allocation(ranks, budget, cost, loss, min(bound, loss), multiplier)


def _loss(layers: Sequence[Layer], ranks: Ranks) -> float:
    return sum(layer.loss(rank) for layer, rank in zip(layers, ranks))


def _uniform(layers: Sequence[Layer], budget: float) -> Ranks:
    """The largest common fraction of parameters that fits."""
    if budget >= sum(layer.dense_cost for layer in layers):
        return [None] * len(layers)

    def ranks(share: float) -> Ranks:
        found = [max(1, int(share * x.d_in * x.d_out / (x.d_in + x.d_out))) for x in layers]
        return [r if r <= x.limit else None for r, x in zip(found, layers)]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(layer.cost(r) for layer, r in zip(layers, ranks(middle))) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return ranks(low)


def relaxed(layers: Sequence[Layer], budget: float) -> tuple[Ranks, float, float]:
    """Ranks within the budget, the best Lagrange bound on any, and its multiplier.

    The multiplier is bisected: where every layer takes its best option at that price of a
    parameter, the cost falls as the price rises. The dual is concave with its maximum where the
    cost passes the budget. What the choice leaves of the budget buys single ranks.
    """
    options = [_options(layer) for layer in layers]

    def at(mu: float) -> tuple[list[int], float, float]:
        """The cheapest best option of each layer, their cost, and the dual."""
        best = [int((losses + mu * costs).argmin()) for costs, losses, _ in options]
        spent = sum(float(costs[i]) for i, (costs, _, _) in zip(best, options))
        lost = sum(float(losses[i]) for i, (_, losses, _) in zip(best, options))
        return best, spent, lost + mu * (spent - budget)

    steps = [(losses[0] - losses[1:]) / (costs[1:] - costs[0]) for costs, losses, _ in options]
    low, high = 0.0, 2 * max((float(step.max()) for step in steps if len(step)), default=0.0)
    if at(low)[1] <= budget:
        high = low
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if at(middle)[1] <= budget else (middle, high)
    (best, spent, bound), (upper, _, other) = at(high), at(low)
    chosen = [ranks[i] for i, (_, _, ranks) in zip(best, options)]
    left = budget - spent
    for index in sorted(range(len(layers)), key=lambda i: best[i] - upper[i]):
        layer, rank = layers[index], chosen[index]
        extra = 0 if rank is None else min(int(left // layer.rank_cost), layer.limit - rank)
        if rank is not None and extra > 0:
            chosen[index] = rank + extra
            left -= extra * layer.rank_cost
    return chosen, max(bound, other), high


def _options(layer: Layer) -> tuple[Array, Array, Ranks]:
    """Costs, rising, losses and ranks that a layer can have."""
    ranks: Ranks = [*range(1, layer.limit + 1), None]
    costs, losses = ([f(r) for r in ranks] for f in (layer.cost, layer.loss))
    return np.array(costs), np.array(losses), ranks


def _exact(layers: Sequence[Layer], budget: float, known: Ranks, mu: float, bound: float) -> Ranks:
    """The best choice of ranks: `known`, or a better one by a search over what the bound allows."""
    gap = (_loss(layers, known) - bound) * (1 + 1e-9)
    costs, losses, excess = np.zeros(1), np.zeros(1), np.zeros(1)
    taken: list[tuple[NDArray[np.int64], Ranks]] = []  # of each layer: parent and option, and ranks
    for layer in layers:
        cost, loss, ranks = _options(layer)
        extra = loss + mu * cost
        extra = extra - extra.min()
        sums = (excess[:, None] + extra).ravel()
        kept = np.flatnonzero((sums <= gap) & ((costs[:, None] + cost).ravel() <= budget))
        excess, costs, losses = (
            np.add.outer(a, b).ravel()[kept]
            for a, b in ((excess, extra), (costs, cost), (losses, loss))
        )
        order = np.lexsort((losses, costs))  # of partial choices, those that cost or lose less
        least = np.minimum.accumulate(losses[order])
        order = order[np.r_[True, losses[order][1:] < least[:-1]]] if len(order) else order
        if not 0 < len(order) <= WIDEST:
            return known
        excess, costs, losses = excess[order], costs[order], losses[order]
        taken.append((kept[order], ranks))
    best = int(losses.argmin())
    if losses[best] >= _loss(layers, known):
        return known
    found: Ranks = []
    for chosen, ranks in reversed(taken):
        best, option = divmod(int(chosen[best]), len(ranks))
        found.insert(0, ranks[option])
    return found
