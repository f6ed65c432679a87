"""Compress every linear layer of a model under one budget.

    small, report = compress_model(model, batches, ratio=0.5)

Any nn.Module whose layers are `nn.Linear` or GPT-2's `Conv1D`. `batches` are what the model is
called with: token tensors, mappings (model(**batch)) or tuples (model(*batch)).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
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
from distil_rank.compress.quantise import QuantLinear, on_integers
from distil_rank.compress.ranks import METHODS, Asked, allocated, given, largest_rank
from distil_rank.compress.sequential import sequential_students
from distil_rank.compress.sites import Batch, Site, find_sites, replaced, trace
from distil_rank.compress.storage import savable
from distil_rank.core.errors import InputError
from distil_rank.core.linear import LowRankLinear, PrunedLinear
from distil_rank.core.lowrank import Optimum, require_finite
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
    method: str = "budget",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    held_out: Iterable[Batch] | None = None,
    loss: Loss | None = probed,
    sequential: bool = False,
    prior: Prior | None = None,
    neurons: bool = True,
    never_slower: bool = True,
    memory: int = MEMORY,
) -> tuple[nn.Module, ModelReport]:
    """Copy of `model` with smaller linear layers, and what was lost. The model is not changed.

    The layers are those whose names match `include` and not `exclude`.
    ratio: their parameters after / before; or `ranks`, one for all or by name.
    method: budget or uniform (see `ranks`).
    loss: whose change is to be small: the squared error of the model's outputs, or a likelihood
    (see `fisher`); None: the sum of the layers' own FVUs.
    sequential: fit each block to what the compressed blocks before it do.
    prior: moments of other proteins by layer name, blended in where they help.
    neurons: drop neurons of an MLP where that loses less than low rank (a ratio and a loss given).
    never_slower: layers whose factors would not be smaller stay dense.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    >>> batches = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(0))
    >>> small, report = compress_model(model, list(batches), ratio=0.5)
    >>> sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    True
    """
    batches = list(batches)
    _check(batches, ratio, ranks, method)
    sites = find_sites(model, include, exclude)
    run = trace(model, batches, sites)
    mlps = find_mlps(model, batches, run) if neurons and loss and ratio is not None else {}
    if prior:
        mlps = {name: mlp for name, mlp in mlps.items() if prior.get(name, [""])[0] == "input"}
    run = [replace(s, of_inputs=s.name in mlps) for s in run]
    groups = collect(model, batches, run, FOLDS if prior else 1, memory, loss=loss)
    metrics: dict[str, Tensor] | None = {} if sequential else None
    solved, picked, blends = _solved(len(run), groups, prior, ratio, ranks, never_slower, metrics)
    cut: dict[str, PrunedMLP] = {}
    if ranks is not None:
        allocation, chosen = None, given(run, ranks, never_slower)
        chosen = {name: rank if name in solved else None for name, rank in chosen.items()}
    else:
        assert ratio is not None
        losses = {n: ([s.name for s in mlps[n]], x.losses.numpy()) for n, x in picked.items()}
        found = allocated(run, solved, losses, ratio, method, None if loss is None else 1.0)
        allocation, chosen = found.record(), found.ranks
        cut = {n: PrunedMLP(mlps[n], *picked[n].kept(k)) for n, k in found.neurons.items()}
    if sequential:
        small = sequential_students(model, batches, run, chosen, cut, solved, metrics or {})
    else:
        students = {s: solved[s.name].student(r) for s in run if (r := chosen[s.name])}
        pruned = {name: x for mlp in cut.values() for name, x in mlp.layers().items()}
        low_rank = {s.name: x.to(s.weight).train(s.module.training) for s, x in students.items()}
        small = replaced(model, {**low_rank, **pruned})
    lost = {name: float(solved[name].fvu[rank]) for name, rank in chosen.items() if rank}
    lost |= {n: float(picked[n].losses[len(x.kept)] / picked[n].losses[0]) for n, x in cut.items()}
    held: Mapping[str, Fidelity] = {}
    if held_out is not None:
        parts = {name: small.get_submodule(name) for name in lost}
        kept = {name: x.kept for name, x in cut.items()}
        held = measure(model, parts, list(held_out), run, memory, loss, kept)
    layers = [_layer_report(s, chosen, solved, lost, held, blends, cut) for s in sites]
    how = method if ranks is None else "given"
    small = savable(small)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    return small, ModelReport(ratio, how, sequential, layers, before, after, allocation)


def _check(batches: Sequence[Batch], ratio: float | None, ranks: Asked | None, method: str) -> None:
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
    if method not in METHODS:
        raise InputError(f"a method out of {', '.join(METHODS)} required, got {method!r}")


def _solved(
    count: int,
    groups: Iterable[Statistics],
    prior: Prior | None,
    ratio: float | None,
    ranks: Asked | None,
    never_slower: bool,
    metrics: dict[str, Tensor] | None,
) -> tuple[dict[str, Optimum], dict[str, Neurons], dict[str, Blend]]:
    """Students of every rank of every layer that can shrink, and what was blended in."""
    from tqdm import tqdm

    solved: dict[str, Optimum] = {}
    picked: dict[str, Neurons] = {}
    blends: dict[str, Blend] = {}
    with tqdm(total=count, unit="layer", desc="layers", disable=None) as bar:
        for statistics in groups:
            for site in statistics.sites:
                bar.update()
                if metrics is not None:
                    metrics |= statistics.metrics
                limit = largest_rank(site.d_in, site.d_out, never_slower)
                if limit < 1:
                    continue
                moments = statistics.moments
                if prior:
                    side, known = prior.get(site.name, ("", None))
                    if side != statistics.side:
                        raise InputError(
                            f"prior moments of layer {site.name} required, the prior has none;"
                            " make it with this model"
                        )
                    near = _rank_near(site, ratio, ranks)
                    moments, blends[site.name] = blended_moments(
                        site.weight, side, statistics.folds, known, near
                    )
                metric = statistics.metrics.get(site.name)
                if metric is None or float(metric.trace()) > UNREAD:
                    solved[site.name] = statistics.solve(site, moments, limit)
                    if site.of_inputs and metric is not None:
                        most = int(MOST * (ratio or 1) * site.d_in)
                        picked[site.name] = selected(site, moments, metric, most)
    return solved, picked, blends


def _rank_near(site: Site, ratio: float | None, ranks: Asked | None) -> int:
    """A rank near the final one, at which the weight of a prior is chosen."""
    if ratio is not None:
        return max(1, int(ratio * site.parameters / (site.d_in + site.d_out)))
    rank = ranks if isinstance(ranks, int) or ranks is None else ranks.get(site.name)
    return max(1, min(rank or 1, site.d_in, site.d_out))


def rounded(small: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy of a model with factors that `dtype` holds exactly: as narrow on disk as its source."""
    result = copy.deepcopy(small)
    for part in result.modules():
        if isinstance(part, LowRankLinear | PrunedLinear):
            with torch.no_grad():
                for p in part.parameters():
                    p.copy_(p.to(dtype))
            require_finite(part)
    return result


def _layer_report(
    site: Site,
    chosen: Mapping[str, int | None],
    solved: Mapping[str, Optimum],
    losses: Mapping[str, float],
    held: Mapping[str, Fidelity],
    blends: Mapping[str, Blend],
    cut: Mapping[str, PrunedMLP],
) -> LayerReport:
    name, rank, dense = site.name, chosen.get(site.name), site.parameters
    mlp = next((x for x in cut.values() if site.name in [s.name for s in x.sites]), None)
    after, note, neurons = dense, "", None
    if mlp is not None:
        neurons = len(mlp.kept), mlp.sites[-1].d_in
        note = f"{neurons[0]} of {neurons[1]} neurons kept"
        after = dense * neurons[0] // neurons[1]
    elif rank is not None:
        after = rank * (site.d_in + site.d_out)
    elif name not in chosen:
        note = "not called in the forward pass"
    else:
        note = "factors would not be smaller"
        if name not in solved and site.parameters > site.d_in + site.d_out:
            note = "the loss does not depend on it"
    return LayerReport(
        *(name, site.d_in, site.d_out, rank, note, dense, after),
        loss=losses.get(name),
        held_out_loss=held[name].loss if name in held else None,
        held_out_floor=held[name].floor if name in held else None,
        held_out_fvu=held[name].fvu if name in held else None,
        prior_weight=blends[name].weight if name in blends and after < dense else None,
        neurons=neurons,
    )


def quantise_model(
    model: nn.Module, batches: Sequence[Batch], bits: int, memory: int = MEMORY
) -> tuple[nn.Module, dict[str, float]]:
    """Copy of a model, dense or compressed, with all its linear layers in 8 or 4 bits.

    Layers are fitted to the model's own activations. Returns by layer the squared error of its
    output over the output's second moment.
    """
    if bits not in (4, 8):
        raise InputError(f"8 or 4 bits required, got {bits}")
    made: dict[str, QuantLinear] = {}
    errors = {}
    sites = trace(model, batches, find_sites(model))
    for statistics in collect(model, batches, sites, memory=memory, inputs_only=True):
        moments = statistics.moments
        second = moments.covariance + moments.mean.outer(moments.mean)
        for site in statistics.sites:
            new = QuantLinear.of(site.weight, site.bias, second, bits)
            W = site.weight.to(second)
            lost, whole = ((x * (x @ second)).sum() for x in (new.weight.to(second) - W, W))
            errors[site.name] = float(lost / whole.clamp_min(1e-300))
            made[site.name] = new.train(site.module.training)
    return on_integers(replaced(model, made)), errors
