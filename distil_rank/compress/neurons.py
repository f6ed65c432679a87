"""Fewer neurons for an MLP, which stays dense: the best are kept, the others regressed on them.

An MLP is a layer y = W a + c and the layers before it, where neuron a_j is a function of their
outputs j alone. With the neurons K kept, the best weights on a_K are the regression

    W' = W S[:, K] S[K, K]^-1,   loss  tr G W (S - S[:, K] S[K, K]^-1 S[K, :]) W^T,

in every metric G. S = Cov a + rho draws W' toward W[:, K]. Neurons are taken one after the other,
each the one that lowers the loss most: a Cholesky factorization of S, L L^T on the neurons taken,
whose pivots look at the output (forward selection). So one pass has the loss of every number of
neurons, and W' of the first k is the first k columns of W L times L_KK^-1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.compress.fisher import outputs_of
from distil_rank.compress.sites import (
    Batch,
    Site,
    call,
    evaluating,
    first_rows,
    replaced,
    watching,
)
from distil_rank.core.certificates import Layer
from distil_rank.core.linear import PrunedLinear, linear
from distil_rank.core.lowrank import Joint
from distil_rank.core.metric import metric_roots
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator

RIDGE = 1e-6  # rho, of the neurons' mean variance
# what a model raises whose layers are not of the width it expects
UNFIT = (RuntimeError, ValueError, IndexError)
PANELS = 512  # steps of a selection: of wide MLPs several neurons are taken at a step


@dataclass(frozen=True)
class Neurons:
    """An MLP with any number of neurons, up to k."""

    order: Tensor  # (k,) as they were taken
    losses: Tensor  # with 0, 1, ... k neurons (k + 1,)
    triangle: Tensor  # L[order] (k, k)
    reads: Tensor  # W L (d_out, k)
    mean: Tensor  # of a (d_ff,)
    output_mean: Tensor  # of y (d_out,)

    def kept(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """K (count,), W' (d_out, count) and bias (d_out,)."""
        K, L = self.order[:count], self.triangle[:count, :count]
        W = torch.linalg.solve_triangular(L, self.reads[:, :count], upper=False, left=False)
        return K, W, self.output_mean - W @ self.mean[K]


def selected(layer: Layer, moments: Moments, metric: Tensor, limit: int | None = None) -> Neurons:
    """Forward selection of at most `limit` neurons; moments of a, metric (d_out, d_out) at y."""
    W, n = layer.weight.detach().to(moments.mean), moments.dim
    root, inverse = metric_roots(metric.to(W))
    S = moments.covariance
    S = S + RIDGE * S.diagonal().mean().clamp_min(1e-300) * torch.eye(n).to(S)
    rest, spread = root @ W @ S, S.diagonal().clone()  # R W times what is left of S; its diagonal
    left = float(((root @ W) * rest).sum())
    order, losses = torch.zeros(0, dtype=torch.long, device=W.device), [left]
    limit = n if limit is None else min(limit, n)
    L, reads = W.new_zeros(n, limit), W.new_zeros(len(W), limit)
    while (k := len(order)) < limit:
        width = min(-(-n // PANELS), limit - k)
        gains = (rest.square().sum(0) / spread).index_fill(0, order, -1.0)
        pool = gains.topk(min(4 * width, n - k)).indices
        near = S[pool][:, pool] - L[pool, :k] @ L[pool, :k].T
        picked, gained = _picked(rest[:, pool], near, width)
        J = pool[picked]
        columns = S[:, J] - L[:, :k] @ L[J, :k].T
        back = torch.linalg.cholesky(columns[J]).T
        L[:, k : k + width], reads[:, k : k + width] = (
            torch.linalg.solve_triangular(back, x, upper=True, left=False)
            for x in (columns, rest[:, J])
        )
        rest -= reads[:, k : k + width] @ L[:, k : k + width].T
        spread -= L[:, k : k + width].square().sum(1)
        order = torch.cat([order, J])
        for gain in gained:
            losses.append(max(0.0, losses[-1] - gain))
    mean = W @ moments.mean
    mean = mean if layer.bias is None else mean + layer.bias.detach().to(mean)
    found = torch.tensor(losses, dtype=torch.float64)
    return Neurons(order, found, L[order], inverse @ reads, moments.mean, mean)


def _picked(rest: Tensor, near: Tensor, count: int) -> tuple[list[int], list[float]]:
    """`count` of few candidates, one after the other, and what each gains."""
    found: list[int] = []
    gained = []
    for _ in range(count):
        gains = rest.square().sum(0) / near.diagonal()
        gains[found] = -1.0
        j = int(gains.argmax())
        gained.append(float(gains[j]))
        root = near[j, j].sqrt()
        column, read = near[:, j] / root, rest[:, j] / root
        rest, near = rest - read.outer(column), near - column.outer(column)
        found.append(j)
    return found, gained


def refitted(
    joint: Joint, kept: Tensor | slice, toward: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """W' (d_out, k) and bias that read inputs K alone; drawn to `toward` (d_out, k)."""
    mean, inputs = joint.input_mean[kept], joint.inputs[kept][:, kept]
    some = replace(joint, input_mean=mean, inputs=inputs, cross=joint.cross[:, kept])
    W, _ = some.regression(toward, ridge)
    return W, joint.output_mean - W @ mean


def unpruned(weight: Tensor, bias: Tensor, kept: Tensor, d_in: int) -> nn.Linear:
    """The layer W' a_K + bias as one that reads all of a."""
    return linear(weight.new_zeros(len(weight), d_in).index_copy(1, kept, weight), bias)


@dataclass(frozen=True)
class PrunedMLP:
    """An MLP of some neurons: rows K of the layers before them, and W' after them."""

    sites: list[Site]  # in running order
    kept: Tensor  # K (k,)
    weight: Tensor  # W' (d_out, k)
    bias: Tensor  # (d_out,)

    def layers(self, joints: Mapping[str, Joint] | None = None) -> dict[str, PrunedLinear]:
        """By name, in the dtype and mode of the dense ones; refitted where inputs have changed.

        joints: by name, of the changed inputs and the dense outputs.
        """
        joints, made = joints or {}, {}
        for s in self.sites:
            after = s is self.sites[-1]
            W, b = (self.weight, self.bias) if after else (s.weight, s.bias)
            if s.name in joints:
                W, b = refitted(joints[s.name], self.kept if after else slice(None), W)
            if not after:
                W, b = W[self.kept], None if b is None else b[self.kept]
            made[s.name] = PrunedLinear(W, b).to(s.weight).train(s.module.training)
        return made


def find_mlps(
    model: nn.Module, batches: Sequence[Batch], sites: Sequence[Site]
) -> dict[str, list[Site]]:
    """Layers of each MLP, in running order, by the name of the last, which reads the neurons.

    Found by trial on two proteins, whatever the modules are: a change of some outputs of the layers
    before changes those inputs of the last alone, and without them nothing else changes. No layer
    is in two of them.
    """
    batch = first_rows(batches[0], 2)
    before, answer = _seen(model, batch, sites)
    mlps = {m[-1].name: m for m in _candidates(sites) if all(len(before[s.name]) == 1 for s in m)}
    draws = generator(0, "half of the neurons")
    half = {
        d: torch.randperm(d, generator=draws) < (d + 1) // 2
        for d in {m[-1].d_in for m in mlps.values()}
    }
    feeding = {s.name for m in mlps.values() for s in m[:-1]}

    def shifted(site: Site, index: int) -> Tensor:
        y = before[site.name][index][1]  # so that no layer changes what the next ones read
        return y + (~half[site.d_out]).to(y) if site.name in feeding else y

    def separate(name: str) -> bool:
        """Whether the shift reached the other half of the inputs, and nothing else."""
        (x, _), (y, _) = before[name][0], after[name][0]
        moved = (x != y).flatten(0, -2).any(0).cpu()
        return bool(moved.any()) and not bool((moved & half[len(moved)]).any())

    def works(names: Iterable[str]) -> bool:
        """Whether the model runs with half of the neurons and does what it did before."""
        parts: dict[str, nn.Module] = {}
        for name in names:
            W = mlps[name][-1].weight
            K = half[W.shape[1]].nonzero()[:, 0].to(W.device)
            parts |= PrunedMLP(mlps[name], K, W[:, K], W.new_zeros(len(W))).layers()
        small = replaced(model, parts)
        lasts = [Site(name, small.get_submodule(name)) for name in names]
        try:
            seen, other = _seen(small, batch, lasts, lambda s, i: before[s.name][i][1])
        except UNFIT:
            return False
        pairs = list(zip(outputs_of(answer), outputs_of(other)))
        for name in names:
            x, y = before[name][0][0], seen[name][0][0]
            pairs.append((x[..., half[x.shape[-1]]], y))
        return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5, True) for a, b in pairs)

    try:
        after, _ = _seen(model, batch, sites, shifted)
    except UNFIT:  # experts that are called in another way
        return {}
    found: list[str] = []
    taken: set[str] = set()
    for name, m in mlps.items():
        if separate(name) and taken.isdisjoint(s.name for s in m):
            found.append(name)
            taken |= {s.name for s in m}
    found = found if works(found) else [name for name in found if works([name])]
    return {name: mlps[name] for name in found}


def _candidates(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """A layer and those right before it that read one other tensor and give as many numbers."""
    for i, last in enumerate(sites):
        start, read = i, sites[i - 1].input
        while start and sites[start - 1].d_out == last.d_in and sites[start - 1].input == read:
            start -= 1
        if start < i and read != last.input:
            yield list(sites[start : i + 1])


def _seen(
    model: nn.Module,
    batch: Batch,
    sites: Sequence[Site],
    change: Callable[[Site, int], Tensor] | None = None,
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], Any]:
    """Inputs and outputs of every call of the sites, and the model's answer.

    change: what a site gives instead at its nth call.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def see(site: Site, x: Tensor, y: Tensor) -> Tensor | None:
        found[site.name].append((x.clone(), y.clone()))  # the model may change them in place
        return None if change is None else change(site, len(found[site.name]) - 1).clone()

    with evaluating(model), watching(sites, see), torch.no_grad():
        return found, call(model, batch)
