"""Compress every linear layer of a model under one budget.

    small, report = compress_model(model, batches, ratio=0.5)

Any nn.Module whose layers are `nn.Linear` or GPT-2's `Conv1D`. `batches` are what the model is
called with: token tensors, mappings (model(**batch)) or tuples (model(*batch)).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from distil_rank.compress.calibration import (
    MEMORY,
    Fidelity,
    Prior,
    Statistics,
    collect,
    measure,
)
from distil_rank.compress.fisher import Loss, probed
from distil_rank.compress.neurons import Neurons, PrunedMLP, find_mlps, selected
from distil_rank.compress.ranks import Asked, allocate, given, largest_rank, low_rank, or_neurons
from distil_rank.compress.sequential import sequential_students
from distil_rank.compress.sites import Batch, Site, find_sites, replaced, trace
from distil_rank.compress.storage import savable
from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import Optimum
from distil_rank.core.moments import Moments
from distil_rank.core.prior import FOLDS, Blend, blended_moments

MOST = 1.5  # times its share of the budget, more neurons are not tried in an MLP
UNREAD = 1e-30  # trace of the metric of a layer that nothing depends on


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer."""

    name: str
    d_in: int
    d_out: int
    rank: int | None  # None: dense
    note: str  # why it stayed dense, what is left of it, or ""
    parameters: int  # before, bias excluded
    parameters_after: int
    loss: float | None = None  # in the layer's metric, over that of a constant; the floor there
    held_out_loss: float | None = None  # as stored, on the dense model's held-out activations
    held_out_floor: float | None = None  # no student of this rank, or these neurons, is below it
    held_out_fvu: float | None = None  # the same error without the metric
    prior_weight: float | None = None
    neurons: tuple[int, int] | None = None  # of an MLP, on its last layer: kept, of how many


@dataclass(frozen=True)
class ModelReport:
    """The whole compression, as it goes into the JSON."""

    ratio: float | None
    method: str
    sequential: bool
    layers: list[LayerReport]
    parameters: int  # of the whole model, tied ones counted once
    parameters_after: int
    allocation: dict[str, float] | None  # cost, loss, Lagrange bound, relative gap, multiplier

    @property
    def mean_fvu(self) -> float | None:
        """On held-out rows, over all chosen layers, dense ones counting 0."""
        found = [x.held_out_fvu for x in self.layers if x.held_out_fvu is not None]
        return sum(found) / len(self.layers) if found else None

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "mean_fvu": self.mean_fvu}


def compress_model(
    model: nn.Module,
    batches: Iterable[Batch],
    ratio: float | None = None,
    *,
    ranks: Asked | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    held_out: Iterable[Batch] | None = None,
    loss: Loss | None = probed,
    sequential: bool = False,
    prior: Prior | None = None,
    neurons: bool = True,
    memory: int = MEMORY,
) -> tuple[nn.Module, ModelReport]:
    """Copy of `model` with smaller linear layers, and what was lost. The model is not changed.

    The layers are those whose names match `include` and not `exclude`; those whose factors would
    not be smaller stay dense.
    ratio: their parameters after / before; or `ranks`, one for all or by name.
    loss: whose change is to be small: the squared error of the model's outputs, or a likelihood
    (see `fisher`); None: the sum of the layers' own FVUs.
    sequential: fit each block to what the compressed blocks before it do.
    prior: moments of other proteins by layer name, blended in where they help.
    neurons: drop neurons of an MLP where that loses less than low rank (a ratio and a loss given).

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    >>> batches = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(0))
    >>> small, report = compress_model(model, list(batches), ratio=0.5)
    >>> sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    True
    """
    batches = list(batches)
    _check(batches, ratio, ranks)
    sites = find_sites(model, include, exclude)
    run = trace(model, batches, sites)
    mlps = find_mlps(model, batches, run) if neurons and loss and ratio is not None else {}
    if prior:
        mlps = {name: mlp for name, mlp in mlps.items() if prior.get(name, [""])[0] == "input"}
    run = [replace(s, of_inputs=s.name in mlps) for s in run]
    groups = collect(model, batches, run, FOLDS if prior else 1, memory, loss=loss)
    solved = _solve(len(run), groups, prior, ratio, ranks, keep=sequential)
    chosen = _choose(run, mlps, solved, ratio, ranks, None if loss is None else 1.0)
    if sequential:
        optima, metrics = solved.optima, solved.metrics
        small = sequential_students(model, batches, run, chosen.ranks, chosen.mlps, optima, metrics)
    else:
        small = replaced(model, _students(run, chosen, solved.optima))
    held: Mapping[str, Fidelity] = {}
    if held_out is not None:
        shrunk = [name for name, rank in chosen.ranks.items() if rank or name in chosen.mlps]
        parts = {name: small.get_submodule(name) for name in shrunk}
        kept = {name: x.kept for name, x in chosen.mlps.items()}
        held = measure(model, parts, list(held_out), run, memory, loss, kept)
    layers = [_layer_report(s, chosen, solved, held.get(s.name)) for s in sites]
    method = "budget" if ranks is None else "given"
    small = savable(small)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    return small, ModelReport(ratio, method, sequential, layers, before, after, chosen.allocation)


def _check(batches: Sequence[Batch], ratio: float | None, ranks: Asked | None) -> None:
    if not batches:
        raise InputError("at least one calibration batch required, got none; give proteins")
    if (ratio is None) == (ranks is None):
        raise InputError(
            f"exactly one of ratio and ranks required, got ratio={ratio}, ranks={ranks}"
        )
    if ratio is not None and not 0 < ratio <= 1:
        raise InputError(
            f"ratio must be above 0 and at most 1, got {ratio}; 0.5 halves the linear layers"
        )


@dataclass
class Solved:
    """Students of every size of every layer that can shrink."""

    optima: dict[str, Optimum] = field(default_factory=dict)
    neurons: dict[str, Neurons] = field(default_factory=dict)  # by the last layer of an MLP
    blends: dict[str, Blend] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)  # where they are used again


def _solve(
    count: int,
    groups: Iterable[Statistics],
    prior: Prior | None,
    ratio: float | None,
    ranks: Asked | None,
    keep: bool,
) -> Solved:
    from tqdm import tqdm

    found = Solved()
    pairs = ((statistics, site) for statistics in groups for site in statistics.sites)
    for statistics, site in tqdm(pairs, "layers", count, unit="layer", disable=None):
        name, metric = site.name, statistics.metrics.get(site.name)
        if keep:
            found.metrics |= statistics.metrics
        limit = largest_rank(site.d_in, site.d_out)
        if limit < 1:
            continue
        moments = statistics.moments
        if prior:
            near = _rank_near(site, ratio, ranks)
            moments, found.blends[name] = _blended(site, statistics, prior, near)
        if metric is None or float(metric.trace()) > UNREAD:
            found.optima[name] = statistics.solve(site, moments, limit)
            if site.of_inputs and metric is not None:
                most = int(MOST * (ratio or 1) * site.d_in)
                found.neurons[name] = selected(site, moments, metric, most)
    return found


def _blended(site: Site, statistics: Statistics, prior: Prior, rank: int) -> tuple[Moments, Blend]:
    side, known = prior.get(site.name, ("", None))
    if side != statistics.side:
        raise InputError(
            f"prior moments of layer {site.name} required, the prior has none;"
            " make it with this model"
        )
    return blended_moments(site.weight, side, statistics.folds, known, rank)


def _rank_near(site: Site, ratio: float | None, ranks: Asked | None) -> int:
    """A rank near the final one, at which the weight of a prior is chosen."""
    if ratio is not None:
        return max(1, int(ratio * site.parameters / (site.d_in + site.d_out)))
    rank = ranks if isinstance(ranks, int) or ranks is None else ranks.get(site.name)
    return max(1, min(rank or 1, site.d_in, site.d_out))


@dataclass(frozen=True)
class Choice:
    """Rank by layer, MLPs of fewer neurons by their last layer, and how good the choice is."""

    ranks: Mapping[str, int | None]
    mlps: dict[str, PrunedMLP]
    allocation: dict[str, float] | None


def _choose(
    run: Sequence[Site],
    mlps: Mapping[str, list[Site]],
    solved: Solved,
    ratio: float | None,
    ranks: Asked | None,
    weight: float | None,
) -> Choice:
    """Within the ratio, or the ranks asked for; layers not solved stay dense."""
    if ranks is not None:
        asked = given(run, ranks)
        return Choice({s: r if s in solved.optima else None for s, r in asked.items()}, {}, None)
    assert ratio is not None
    options = {}
    for s in run:
        tails = (
            solved.optima[s.name].tails.cpu().numpy() if s.name in solved.optima else np.zeros(1)
        )
        options[s.name] = low_rank(s.name, s.d_in, s.d_out, tails, weight)
    for name, neurons in solved.neurons.items():
        around = [options.pop(s.name) for s in mlps[name]]
        options[name] = or_neurons(around, name, mlps[name][-1].d_in, neurons.losses.numpy())
    found = allocate(list(options.values()), ratio * sum(s.parameters for s in run))
    cut = {n: PrunedMLP(mlps[n], *solved.neurons[n].kept(k)) for n, k in found.neurons.items()}
    return Choice(found.ranks, cut, found.record())


def _students(
    run: Sequence[Site], chosen: Choice, optima: Mapping[str, Optimum]
) -> dict[str, nn.Module]:
    """Layers to put in place, in the dtype and mode of the dense ones."""
    made: dict[str, nn.Module] = {}
    for s in run:
        if rank := chosen.ranks[s.name]:
            made[s.name] = optima[s.name].student(rank).to(s.weight).train(s.module.training)
    for mlp in chosen.mlps.values():
        made |= mlp.layers()
    return made


def _layer_report(site: Site, chosen: Choice, solved: Solved, held: Fidelity | None) -> LayerReport:
    name, dense = site.name, site.parameters
    rank = chosen.ranks.get(name)
    loss, after, note, neurons = None, dense, "", None
    if rank is not None:
        after, loss = rank * (site.d_in + site.d_out), float(solved.optima[name].fvu[rank])
    elif name not in chosen.ranks:
        note = "not called in the forward pass"
    else:
        note = "factors would not be smaller"
        if name not in solved.optima and largest_rank(site.d_in, site.d_out):
            note = "the loss does not depend on it"
    for last, mlp in chosen.mlps.items():
        if name in [s.name for s in mlp.sites]:
            neurons = len(mlp.kept), mlp.sites[-1].d_in
            note = f"{neurons[0]} of {neurons[1]} neurons kept"
            after = dense * neurons[0] // neurons[1]
        if name == last:
            losses = solved.neurons[name].losses
            loss = float(losses[len(mlp.kept)] / losses[0])
    weight = solved.blends[name].weight if name in solved.blends and after < dense else None
    measured: dict[str, Any] = {} if held is None else vars(held)
    return LayerReport(
        *(name, site.d_in, site.d_out, rank, note, dense, after),
        loss=loss,
        prior_weight=weight,
        neurons=neurons,
        **{f"held_out_{key}": value for key, value in measured.items()},
    )
