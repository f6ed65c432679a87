"""Moments of every chosen layer in one streaming pass over calibration batches, memory bounded by layer groups.

Of each layer the smaller side is kept, the moments of its inputs or of its outputs (both give the optimum, see `solutions`);
layers that read the same tensor (query, key, value) share one. Padding is left out; start and end tokens are not: every
residue attends to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.prior import merged
from distil_rank.compress.sites import Batch, Call, Site, call, evaluating, read_mask, rows_of, watching
from distil_rank.core.lowrank import Spectrum, spectrum_from_inputs, spectrum_from_outputs
from distil_rank.core.moments import Moments

MEMORY = 4 << 30  # bytes of moments held at once, unless the caller says otherwise
Mask = Callable[[Batch], Tensor | None]


@dataclass
class Statistics:
    """Moments of one layer's inputs or outputs, by fold of the calibration batches."""

    side: str  # "input" or "output"
    folds: list[Moments]

    @property
    def moments(self) -> Moments:
        """Of all folds together."""
        return self.folds[0] if len(self.folds) == 1 else merged(self.folds)


def spectrum(site: Site, side: str, moments: Moments, limit: int | None = None) -> Spectrum:
    """Closed-form students of a site from the moments of either side."""
    if side == "input":
        return spectrum_from_inputs(site.weight, moments, limit)
    return spectrum_from_outputs(site.weight, site.bias, moments, limit)


@dataclass(frozen=True)
class Unit:
    """Sites that share one moment matrix: several that read one tensor, or the outputs of one."""

    side: str
    dim: int
    sites: list[Site]


def collect(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    calls: dict[str, Call],
    mask: Mask | None = None,
    folds: int = 1,
    memory: int = MEMORY,
    inputs_only: bool = False,
) -> Iterator[dict[str, Statistics]]:
    """Statistics of the sites, one group of layers after the other; a group's moments take at most `memory` bytes.

    Batch i belongs to fold i modulo `folds`. One pass over the batches a group.
    """
    for group in groups(sites, calls, folds, memory, inputs_only):
        units = {unit.sites[0].name: unit for unit in group}
        gathered = {name: [Moments(unit.dim) for _ in range(folds)] for name, unit in units.items()}
        for index, batch in enumerate(batches):
            kept = read_mask(model, batch) if mask is None else mask(batch)

            def see(
                site: Site, x: Tensor, y: Tensor, kept=kept, fold=index % folds, units=units, gathered=gathered
            ) -> None:
                read = x if units[site.name].side == "input" else y
                update(gathered[site.name][fold], rows_of(read, calls[site.name].layout, kept), site.name)

            with evaluating(model), watching([unit.sites[0] for unit in group], see), torch.no_grad():
                call(model, batch)
        for name, moments in gathered.items():
            seen = sum(m.count for m in moments)
            if seen < 2:
                raise InputError(f"at least 2 calibration tokens required, layer {name} saw {seen:.0f}; give proteins")
        yield {s.name: Statistics(unit.side, gathered[name]) for name, unit in units.items() for s in unit.sites}


def update(moments: Moments, rows: Tensor, name: str) -> None:
    try:
        moments.update(rows)
    except ValueError as error:
        raise InputError(
            f"finite activations required, layer {name}: {error}; check the weights and the input"
        ) from None


def groups(
    sites: Sequence[Site], calls: dict[str, Call], folds: int, memory: int, inputs_only: bool = False
) -> Iterator[list[Unit]]:
    """Layers in running order, in groups whose moments fit into `memory` bytes."""
    readers: dict[int, list[Site]] = {}
    for site in sorted(sites, key=lambda s: calls[s.name].order):
        readers.setdefault(calls[site.name].input, []).append(site)
    group: list[Unit] = []
    used = 0
    for members in readers.values():
        shared = Unit("input", members[0].d_in, members)
        single = [Unit("output", s.d_out, [s]) for s in members]
        for unit in [shared] if inputs_only or shared.dim**2 <= sum(u.dim**2 for u in single) else single:
            size = 8 * unit.dim**2 * folds
            if group and used + size > memory:
                yield group
                group, used = [], 0
            group.append(unit)
            used += size
    if group:
        yield group


@dataclass(frozen=True)
class Fidelity:
    """One layer's student against its teacher on the teacher's own inputs."""

    rows: float
    fvu: float  # of the student as stored
    floor: float  # no student of this rank is below it on these rows


def measure(
    model: nn.Module,
    students: dict[str, nn.Module],
    batches: Sequence[Batch],
    sites: Sequence[Site],
    calls: dict[str, Call],
    mask: Mask | None = None,
    memory: int = MEMORY,
) -> dict[str, Fidelity]:
    """Held-out FVU of every student beside its floor, on the dense model's activations."""
    chosen = [s for s in sites if s.name in students]
    errors: dict[str, float] = {s.name: 0.0 for s in chosen}
    for batch in batches:
        kept = read_mask(model, batch) if mask is None else mask(batch)

        def see(site: Site, x: Tensor, y: Tensor, kept=kept) -> None:
            layout = calls[site.name].layout
            error = rows_of(y, layout, kept).double() - students[site.name](rows_of(x, layout, kept)).double()
            errors[site.name] += float(error.square().sum())

        with evaluating(model), watching(chosen, see), torch.no_grad():
            call(model, batch)
    found = {}
    for part in collect(model, batches, chosen, calls, mask, memory=memory):
        for site in chosen:
            if site.name not in part:
                continue
            moments = part[site.name].moments
            rank = cast(int, students[site.name].rank)
            best = spectrum(site, part[site.name].side, moments, rank)
            scale = best.variance * moments.count
            found[site.name] = Fidelity(moments.count, errors[site.name] / scale if scale > 0 else 0.0, best.fvu(rank))
    return found
