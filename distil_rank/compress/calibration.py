"""Moments of every chosen layer, streaming over calibration batches in bounded memory.

Of each layer the smaller side is kept, the moments of its inputs or of its outputs (both give the
optimum, see `core.lowrank`); layers that read the same tensor (query, key, value) share one.
Padding is left out; start and end tokens are not: every residue attends to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from distil_rank.compress.sites import Batch, Read, Site, observe
from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import Optimum, optimum, optimum_from_outputs
from distil_rank.core.moments import Moments
from distil_rank.core.prior import merged
from distil_rank.core.records import load_tensors, save_tensors

SCHEMA = "distil-rank/model-moments/1"
Prior = dict[str, tuple[str, Moments]]  # layer -> side and moments, of other proteins
MEMORY = 4 << 30  # bytes of moments held at once, unless the caller says otherwise


@dataclass(frozen=True)
class Statistics:
    """Moments, by fold, of a tensor that several layers read, or of one layer's outputs."""

    side: str  # "input" or "output"
    sites: list[Site]
    folds: list[Moments]

    @property
    def moments(self) -> Moments:
        """Of all folds together."""
        return self.folds[0] if len(self.folds) == 1 else merged(self.folds)


def collect(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    folds: int = 1,
    memory: int = MEMORY,
    inputs_only: bool = False,
) -> Iterator[Statistics]:
    """Statistics of the sites in groups of at most `memory` bytes, one pass over the batches each.

    Batch i belongs to fold i modulo `folds`.
    """
    for group in groups(sites, folds, memory, inputs_only):
        for index, batch in enumerate(batches):
            into = {s.sites[0].name: (s.side, s.folds[index % folds]) for s in group}

            def see(site: Site, read: Read, into: Mapping[str, tuple[str, Moments]] = into) -> None:
                side, moments = into[site.name]
                update(moments, read(side), site.name)

            observe(model, batch, [s.sites[0] for s in group], see)
        for statistics in group:
            seen = sum(m.count for m in statistics.folds)
            if seen < 2:
                raise InputError(
                    f"at least 2 calibration tokens required, layer {statistics.sites[0].name} saw"
                    f" {seen:.0f}; give proteins"
                )
        yield from group


def update(moments: Moments, rows: Tensor, name: str) -> None:
    """Add rows (n, d); InputError names the layer where they are not finite."""
    try:
        moments.update(rows)
    except ValueError as error:
        raise InputError(
            f"finite activations required, layer {name}: {error}; check the weights and the input"
        ) from None


def groups(
    sites: Sequence[Site], folds: int, memory: int, inputs_only: bool
) -> Iterator[list[Statistics]]:
    """Empty moments of layers in running order, in groups that fit into `memory` bytes."""
    readers: dict[tuple[int, int], list[Site]] = {}
    for site in sites:
        readers.setdefault(site.input, []).append(site)
    group: list[Statistics] = []
    used = 0
    for members in readers.values():
        shared = inputs_only or members[0].d_in ** 2 <= sum(s.d_out**2 for s in members)
        units = [members] if shared else [[s] for s in members]
        for unit in units:
            dim = unit[0].d_in if shared else unit[0].d_out
            size = 8 * dim**2 * folds
            if group and used + size > memory:
                yield group
                group, used = [], 0
            moments = [Moments(dim, unit[0].weight.device) for _ in range(folds)]
            group.append(Statistics("input" if shared else "output", unit, moments))
            used += size
    if group:
        yield group


def solve(site: Site, side: str, moments: Moments, rank: int | None = None) -> Optimum:
    """Closed-form students of a site from the moments of either side."""
    if side == "input":
        return optimum(site.weight, site.bias, moments, rank)
    return optimum_from_outputs(site.weight, site.bias, moments, rank)


@dataclass(frozen=True)
class Fidelity:
    """One layer's student against its teacher on the teacher's own inputs."""

    fvu: float  # of the student as stored
    floor: float  # no student of this rank is below it on these rows


def measure(
    model: nn.Module,
    students: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    sites: Sequence[Site],
    memory: int = MEMORY,
) -> dict[str, Fidelity]:
    """FVU of every student beside its floor, on the dense model's activations."""
    chosen = [s for s in sites if s.name in students]
    errors = {s.name: 0.0 for s in chosen}

    def see(site: Site, read: Read) -> None:
        error = read("output").double() - students[site.name](read("input")).double()
        errors[site.name] += float(error.square().sum())

    for batch in batches:
        observe(model, batch, chosen, see)
    found = {}
    for statistics in collect(model, batches, chosen, memory=memory):
        for site in statistics.sites:
            rank = cast(int, students[site.name].rank)
            best = solve(site, statistics.side, statistics.moments, rank)
            scale = best.variance * statistics.moments.count
            fvu = errors[site.name] / scale if scale > 0 else 0.0
            found[site.name] = Fidelity(fvu, float(best.fvu[rank]))
    return found


def save_prior(path: str | Path, found: Iterable[Statistics], **provenance: object) -> None:
    """Write the moments of many layers as one safetensors file; shared ones are stored once."""
    layers: dict[str, dict[str, str]] = {}
    tensors: dict[str, Tensor] = {}
    for statistics in found:
        origin = statistics.sites[0].name
        layers |= {s.name: {"side": statistics.side, "from": origin} for s in statistics.sites}
        state = statistics.moments.state()
        tensors |= {f"{origin}/{key}": value for key, value in state.items()}
    save_tensors(path, tensors, SCHEMA, layers=layers, provenance=provenance)


def load_prior(path: str | Path, device: torch.device | str = "cpu") -> Prior:
    """What `save_prior` wrote."""
    tensors, header = load_tensors(path, SCHEMA, "a model's moments (--moments-out)")
    made = {
        origin: Moments.from_state(
            {k: tensors[f"{origin}/{k}"].to(device) for k in ("count", "mean", "scatter")}
        )
        for origin in {layer["from"] for layer in header["layers"].values()}
    }
    return {name: (layer["side"], made[layer["from"]]) for name, layer in header["layers"].items()}
