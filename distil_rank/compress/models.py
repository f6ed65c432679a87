"""Compress every linear layer of a model under one budget.

    small, report = compress_model(model, batches, ratio=0.5)

Any nn.Module: fair-esm ESM2, transformers EsmModel, EsmForMaskedLM, GPT-2 (whose Conv1D counts as a linear layer). `batches` are
what the model is called with: token tensors, mappings (model(**batch)) or tuples (model(*batch)).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.compress.calibration import MEMORY, Fidelity, Mask, Statistics, collect, measure, spectrum
from distil_rank.core.lowrank import LowRankLinear
from distil_rank.compress.model_plan import check_request, choose_ranks, rank_guess, rank_limit
from distil_rank.core.prior import FOLDS, Blend, blended_moments
from distil_rank.compress.sites import Batch, Site, evaluating, find_sites, trace
from distil_rank.core.lowrank import Spectrum
from distil_rank.core.moments import Moments

Loss = Callable[[nn.Module, Batch], Tensor]  # summed over the predicted tokens of a batch
Prior = Mapping[str, tuple[str, Moments]]


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer."""

    name: str
    d_in: int
    d_out: int
    rank: int | None  # None: dense
    note: str  # why it stayed dense, or ""
    parameters: int  # before, bias excluded
    parameters_after: int
    fvu: float | None = None  # expected on the calibration rows, which is the floor there
    held_out_fvu: float | None = None  # as stored, on the dense model's held-out activations
    held_out_floor_fvu: float | None = None  # no student of this rank is below it there
    prior_weight: float | None = None


@dataclass(frozen=True)
class ModelReport:
    """The whole compression, as it goes into the JSON."""

    ratio: float | None
    method: str
    unit: str
    sequential: bool
    layers: list[LayerReport]
    parameters: int  # of the whole model
    parameters_after: int
    allocation: dict[str, Any] | None  # cost, loss, Lagrange bound, relative gap, multiplier

    @property
    def mean_fvu(self) -> float:
        """Over all chosen layers, dense ones counting 0; held out where measured."""
        values = [x.fvu if x.held_out_fvu is None else x.held_out_fvu for x in self.layers if x.rank is not None]
        return sum(v for v in values if v is not None) / max(1, len(self.layers))

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "mean_fvu": self.mean_fvu}


def compress_model(
    model: nn.Module,
    batches: Iterable[Batch],
    ratio: float | None = None,
    *,
    ranks: int | Mapping[str, int | None] | None = None,
    method: str = "budget",
    unit: str = "parameters",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    held_out: Iterable[Batch] | None = None,
    mask: Mask | None = None,
    loss: Loss | None = None,
    sequential: bool = False,
    prior: Prior | None = None,
    never_slower: bool = True,
    memory: int = MEMORY,
) -> tuple[nn.Module, ModelReport]:
    """Copy of `model` whose linear layers (names matching `include` and not `exclude`) are low-rank, and what was lost.

    ratio: parameters (or FLOPs, `unit`) of those layers after / before, in (0, 1]; or `ranks`, one for all or by name.
    method: uniform, energy or budget (see `ranks`). loss: weigh layers by the gradient of this loss (see `sensitivity`).
    mask(batch): positions (B, T) that count; by default all but padding.
    sequential: fit each block on what the compressed blocks before it put out. never_slower: factors that would not be smaller
    stay dense. The model itself is not changed.
    """
    batches = list(batches)
    check_request(batches, ratio, ranks, method, unit)
    sites = find_sites(model, include, exclude)
    with evaluating(model):
        calls = trace(model, batches[0], sites)
    called = [s for s in sites if s.name in calls]
    if not called:
        raise InputError("a linear layer that runs in the forward pass required, none of the chosen ones was called")
    from distil_rank.compress.sensitivity import layer_importance

    importance = layer_importance(model, batches, called, calls, loss, mask) if loss is not None else {}
    statistics = collect(model, batches, called, calls, mask, FOLDS if prior else 1, memory)
    spectra, blends = _solved(called, statistics, prior, rank_guess(ranks, ratio), never_slower)
    rows = {name: call.rows if unit == "flops" else 1.0 for name, call in calls.items()}
    allocation, chosen = choose_ranks(called, spectra, ratio, ranks, method, importance, rows, never_slower)
    if sequential:
        from distil_rank.compress.sequential import sequential_students

        small = sequential_students(model, batches, called, calls, chosen, spectra, mask)
    else:
        small = replaced(model, {s.name: student_of(s, spectra[s.name], r) for s in called if (r := chosen[s.name])})
    found: dict[str, Fidelity] = {}
    if held_out is not None:
        modules = dict(small.named_modules())
        students = {s.name: modules[s.name] for s in called if chosen[s.name]}
        found = measure(model, students, list(held_out), called, calls, mask, memory)
    reports = [_layer_report(s, s.name in calls, chosen, spectra, found, blends) for s in sites]
    return small, ModelReport(
        ratio,
        method if ranks is None else "given",
        unit,
        sequential,
        reports,
        count_parameters(model),
        count_parameters(small),
        allocation,
    )


def _solved(
    sites: Sequence[Site],
    groups: Iterable[Mapping[str, Statistics]],
    prior: Prior | None,
    guess: Callable[[Site], int],
    never_slower: bool,
) -> tuple[dict[str, Spectrum], dict[str, Blend]]:
    """Students of every rank of every layer that can shrink, group by group of moments, and what was blended in."""
    from tqdm import tqdm

    spectra: dict[str, Spectrum] = {}
    blends: dict[str, Blend] = {}
    with tqdm(total=len(sites), unit="layer", desc="layers", disable=None) as bar:
        for part in groups:
            for site in [s for s in sites if s.name in part]:
                side, moments, limit = part[site.name].side, part[site.name].moments, rank_limit(site, never_slower)
                bar.update()
                if limit < 1:
                    continue
                if prior:
                    known = prior.get(site.name)
                    if known is None or known[0] != side:
                        raise InputError(
                            f"prior moments of layer {site.name} required, the prior has none; make it with this model"
                        )
                    moments, blends[site.name] = blended_moments(
                        site.weight, side, part[site.name].folds, known[1], guess(site)
                    )
                spectra[site.name] = spectrum(site, side, moments, limit)
    return spectra, blends


def student_of(site: Site, spectrum: Spectrum, rank: int) -> LowRankLinear:
    student = spectrum.student(site.weight, site.bias, rank)
    return student.train(site.module.training)


def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Deep copy of the model in which the named modules are others; what they replace is not copied."""
    old = dict(model.named_modules())
    return copy.deepcopy(model, {id(old[name]): module for name, module in modules.items()})


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def _layer_report(
    site: Site,
    called: bool,
    chosen: Mapping[str, int | None],
    spectra: Mapping[str, Spectrum],
    found: Mapping[str, Fidelity],
    blends: Mapping[str, Blend],
) -> LayerReport:
    rank = chosen.get(site.name)
    if rank is None:
        note = "factors would not be smaller" if called else "not called in the forward pass"
        return LayerReport(site.name, site.d_in, site.d_out, None, note, site.parameters, site.parameters)
    held = found.get(site.name)
    return LayerReport(
        site.name,
        site.d_in,
        site.d_out,
        rank,
        "",
        site.parameters,
        rank * (site.d_in + site.d_out),
        spectra[site.name].fvu(rank),
        held.fvu if held else None,
        held.floor if held else None,
        blends[site.name].weight if site.name in blends else None,
    )
