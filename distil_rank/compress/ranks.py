"""Ranks for many layers under one budget, with a Lagrange certificate of how good the choice is.

Layer l at rank r loses importance_l * sum_{i>r} lambda_{l,i} and costs r (d_in + d_out) parameters;
left dense it loses nothing and costs d_in d_out. `budget` minimizes the total loss: it walks the
lower convex hulls of all layers' (cost, loss) points by falling gain per parameter, takes uniform
ranks where those are better, and then searches what could still be better. For every mu >= 0

    min_ranks loss(ranks)  >=  sum_l min_r [ loss_l(r) + mu cost_l(r) ] - mu budget   (weak duality)

so the right-hand side certifies what no choice of ranks under the budget can beat. An option of a
layer whose term exceeds the layer's least one by more than the gap between loss and bound is in no
better choice. Few options are left, and a search over their sums is exact, unless it would have to
keep more than WIDEST of them: then the best so far stands, with its gap. A layer whose factors
would cost as much as the dense layer stays dense, whatever the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    bound, multiplier = dual_bound(layers, budget)
    chosen = _uniform(layers, budget)
    if method == "budget":
        chosen = min(_budget(layers, budget), chosen, key=lambda ranks: _loss(layers, ranks))
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

    def rank(layer: Layer, fraction: float) -> int:
        return int(fraction * layer.d_in * layer.d_out / (layer.d_in + layer.d_out))

    return _largest(rank, layers, budget)


def _largest(rank: Callable[[Layer, float], int], layers: Sequence[Layer], budget: float) -> Ranks:
    """Bisect the argument of `rank` in [0, 1] for the largest cost within the budget."""

    def ranks(share: float) -> Ranks:
        found = [max(1, rank(layer, share)) for layer in layers]
        return [r if r <= layer.limit else None for r, layer in zip(found, layers)]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(layer.cost(r) for layer, r in zip(layers, ranks(middle))) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return ranks(low)


def hull(layer: Layer) -> tuple[Array, Array, Ranks]:
    """Lower convex hull of the layer's choices, by rising cost: costs, losses, ranks."""
    dense = layer.dense_cost
    if layer.limit < 1:
        return np.array([dense]), np.array([0.0]), [None]
    ranks = list(range(1, layer.limit + 1))
    costs: Array = np.array(ranks) * layer.rank_cost
    losses = layer.losses[1 : layer.limit + 1]
    # the curve is convex, so the hull leaves it where the slope of the step to dense is least
    last = int(np.argmin(losses / (dense - costs)))
    end = last + 1
    return np.append(costs[:end], dense), np.append(losses[:end], 0.0), [*ranks[:end], None]


def _gains(costs: Array, losses: Array) -> Array:
    """Loss saved per unit of cost by each step along a hull."""
    return -np.diff(losses) / np.diff(costs)


def _budget(layers: Sequence[Layer], budget: float) -> Ranks:
    hulls = [hull(layer) for layer in layers]
    steps = []  # (-gain, layer, step): within a layer gains fall, so sorting keeps its order
    for index, (costs, losses, _) in enumerate(hulls):
        # rounding must not reorder the steps of one layer
        gains = np.minimum.accumulate(_gains(costs, losses))
        steps += [(-gain, index, step) for step, gain in enumerate(gains)]
    position = [0] * len(layers)
    left = budget - sum(float(costs[0]) for costs, _, _ in hulls)
    blocked: set[int] = set()
    for _, index, step in sorted(steps):
        costs = hulls[index][0]
        price = float(costs[step + 1] - costs[step])
        if index in blocked or price > left:
            blocked.add(index)
            continue
        position[index] = step + 1
        left -= price
    chosen = [ranks[p] for (_, _, ranks), p in zip(hulls, position)]
    # what is left buys single ranks below a dense step that could not be paid
    for index in sorted(blocked, key=lambda i: -layers[i].loss(chosen[i])):
        rank = chosen[index]
        if rank is not None:
            extra = min(int(left // layers[index].rank_cost), layers[index].limit - rank)
            chosen[index] = rank + extra
            left -= extra * layers[index].rank_cost
    return chosen


def _exact(layers: Sequence[Layer], budget: float, known: Ranks, mu: float, bound: float) -> Ranks:
    """The best choice of ranks: `known`, or a better one by a search over what the bound allows."""
    gap = (_loss(layers, known) - bound) * (1 + 1e-9)
    costs, losses, excess = np.zeros(1), np.zeros(1), np.zeros(1)
    taken: list[tuple[NDArray[np.int64], Ranks]] = []  # of each layer: parent and option, and ranks
    for layer in layers:
        ranks: Ranks = [*range(1, layer.limit + 1), None]
        cost = np.array([layer.cost(r) for r in ranks])
        loss = np.array([layer.loss(r) for r in ranks])
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


def dual_bound(layers: Sequence[Layer], budget: float) -> tuple[float, float]:
    """The best Lagrange lower bound on the loss under the budget, and its multiplier."""
    hulls = [hull(layer)[:2] for layer in layers]
    breaks = np.unique(np.concatenate([*(_gains(*h) for h in hulls), np.zeros(1)]))

    def value(mu: float) -> tuple[float, float]:
        best = [int((losses + mu * costs).argmin()) for costs, losses in hulls]
        spent = sum(costs[i] for i, (costs, _) in zip(best, hulls))
        least = sum(losses[i] + mu * costs[i] for i, (costs, losses) in zip(best, hulls))
        return least - mu * budget, spent

    # concave in mu, with slope (spent - budget): bisect for the change of sign
    low, high = 0, len(breaks) - 1
    while low < high:
        middle = (low + high) // 2
        if value(breaks[middle])[1] > budget:
            low = middle + 1
        else:
            high = middle
    candidates = [breaks[i] for i in (low - 1, low) if i >= 0]
    return max((float(value(mu)[0]), float(mu)) for mu in candidates)
