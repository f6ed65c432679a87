"""Ranks for many layers under one budget, with a Lagrange certificate of how good the choice is.

Layer l at rank r loses importance_l * sum_{i>r} lambda_{l,i} and costs r (d_in + d_out) parameters;
left dense it loses nothing and costs d_in d_out. The layers of an MLP may instead keep k neurons
(`neurons`). `budget` minimizes the total loss: every layer or MLP takes its best option at one
price of a parameter, or uniform shares where those are better, and then what could still be better
is searched. For every mu >= 0

    min loss  >=  sum_l min_o [ loss_l(o) + mu cost_l(o) ] - mu budget   (weak duality)

so the right-hand side certifies what no choice of options o under the budget can beat. An option
whose term exceeds the least one by more than the gap between loss and bound is in no better choice.
Few options are left, and a search over their sums is exact, unless it would have to keep more than
WIDEST of them: then the best so far stands, with its gap. A layer whose factors would cost as much
as the dense layer stays dense, whatever the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distil_rank.compress.sites import Site
from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import Optimum

METHODS = ("uniform", "budget")
WIDEST = 20_000  # partial choices that the exact search keeps
Array = NDArray[np.float64]
Ranks = dict[str, int | None]  # by layer; None: dense, of all neurons or some
Asked = int | Mapping[str, int | None]  # one rank for all layers, or by name


class Options(NamedTuple):
    """What a layer or an MLP can become: costs rise, losses fall."""

    costs: Array
    losses: Array
    picks: list[tuple[Ranks, int | None]]  # ranks, and the neurons kept where ranks are not it


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

    def cost(self, rank: int | None) -> float:
        return self.dense_cost if rank is None else rank * self.rank_cost

    def loss(self, rank: int | None) -> float:
        weight = self.importance
        if weight is None:
            weight = 1 / self.variance if self.variance > 0 else 0.0
        return 0.0 if rank is None else weight * float(self.tails[rank])

    @property
    def options(self) -> Options:
        ranks = [*range(1, self.limit + 1), None]
        costs, losses = (np.array([f(r) for r in ranks]) for f in (self.cost, self.loss))
        return Options(costs, losses, [({self.name: rank}, None) for rank in ranks])


@dataclass(frozen=True)
class MLP:
    """Layers around neurons: each at a rank of its own, or dense with k of the neurons."""

    name: str
    layers: tuple[Layer, ...]
    losses: Array  # with 0 ... k neurons

    @property
    def dense_cost(self) -> float:
        return sum(layer.dense_cost for layer in self.layers)

    @property
    def options(self) -> Options:
        width = self.layers[-1].d_in
        kept, dense = np.arange(1, len(self.losses)), Ranks.fromkeys(x.name for x in self.layers)
        prices = kept * self.dense_cost / width
        some = Options(prices, self.losses[1:], [(dense, int(k)) for k in kept])
        found = reduce(_both, (layer.options for layer in self.layers))
        costs, losses = map(np.append, found[:2], some[:2])
        order, picks = _front(costs, losses), [*found.picks, *some.picks]
        return Options(costs[order], losses[order], [picks[i] for i in order])


def _both(a: Options, b: Options) -> Options:
    """Options of two layers together, without those that another one beats."""
    costs, losses = (np.add.outer(x, y).ravel() for x, y in zip(a[:2], b[:2]))
    order = _front(costs, losses)
    pairs = (divmod(i, len(b.costs)) for i in order.tolist())
    return Options(
        costs[order], losses[order], [({**a.picks[i][0], **b.picks[j][0]}, None) for i, j in pairs]
    )


def _front(costs: Array, losses: Array) -> NDArray[np.int64]:
    """Indices, by rising cost, of what nothing else beats in both."""
    order = np.lexsort((losses, costs))
    least = np.minimum.accumulate(losses[order])
    return order[np.r_[True, losses[order][1:] < least[:-1]]] if len(order) else order


@dataclass(frozen=True)
class Allocation:
    """Rank by layer, neurons by MLP, and how far from the best choice it can be."""

    ranks: Ranks
    budget: float
    cost: float
    loss: float  # sum of the weighted losses
    bound: float  # no choice of these options under this budget loses less
    multiplier: float  # loss saved by one more parameter
    neurons: dict[str, int] = field(default_factory=dict)

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
    neurons: Mapping[str, tuple[Sequence[str], Array]],
    ratio: float,
    method: str,
    importance: float | None,
) -> Allocation:
    """Choices for a model's layers at this ratio of their cost; layers not solved stay dense.

    neurons: by MLP, its layers and the loss with 0, 1, ... of its neurons.
    """
    layers = {}
    for s in sites:
        tails = solved[s.name].tails.cpu().numpy() if s.name in solved else np.zeros(1)
        layers[s.name] = Layer(s.name, s.d_in, s.d_out, tails, importance)
    mlps = [MLP(n, tuple(layers.pop(m) for m in names), x) for n, (names, x) in neurons.items()]
    found: list[Layer | MLP] = [*layers.values(), *mlps]
    return allocate(found, ratio * sum(x.dense_cost for x in found), method)


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


def allocate(layers: Sequence[Layer | MLP], budget: float, method: str = "budget") -> Allocation:
    """Choose an option of every layer or MLP so that the total cost stays within `budget`.

    `uniform`: every one keeps the same fraction of its parameters; `budget`: the total weighted
    loss is least, up to the gap that the result states.
    """
    if method not in METHODS:
        raise InputError(f"a method out of {', '.join(METHODS)} required, got {method!r}")
    options = [layer.options for layer in layers]
    floor = sum(x.costs[0] for x in options)
    if budget < floor:
        raise InputError(
            f"a budget of at least {floor:.0f} (rank 1 everywhere) required, got {budget:.0f};"
            " ask for less"
        )

    def total(chosen: Sequence[int]) -> float:
        return sum(float(x.losses[i]) for i, x in zip(chosen, options))

    found, bound, multiplier = relaxed(options, budget)
    chosen = _uniform(options, budget)
    if method == "budget":
        chosen = min(found, chosen, key=total)
        better = _exact(options, budget, multiplier, (total(chosen) - bound) * (1 + 1e-9))
        chosen = min(chosen, better or chosen, key=total)
    cost, loss = sum(float(x.costs[i]) for i, x in zip(chosen, options)), total(chosen)
    ranks: Ranks = {}
    neurons = {}
    for layer, i, x in zip(layers, chosen, options):
        ranks |= x.picks[i][0]
        if (kept := x.picks[i][1]) is not None:
            neurons[layer.name] = kept
    return Allocation(ranks, budget, cost, loss, min(bound, loss), multiplier, neurons)


def _uniform(options: Sequence[Options], budget: float) -> list[int]:
    """The largest common fraction of parameters that fits."""

    def chosen(share: float) -> list[int]:
        last = (np.searchsorted(x.costs, share * x.costs[-1], "right") - 1 for x in options)
        return [max(0, int(i)) for i in last]

    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(x.costs[i] for x, i in zip(options, chosen(middle))) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return chosen(low)


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
