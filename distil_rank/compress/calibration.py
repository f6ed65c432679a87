"""Moments of every chosen layer, streaming over calibration batches in bounded memory.

Of each layer the smaller side is kept, the moments of its inputs or of its outputs (both give the
optimum, see `core.lowrank`); layers that read the same tensor (query, key, value) share one.
Padding is left out; start and end tokens are not: every residue attends to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.compress.fisher import Loss, metrics
from distil_rank.compress.neurons import refitted, unpruned
from distil_rank.compress.sites import Batch, Read, Site, observe, tokens_of
from distil_rank.core.certificates import student_fvu
from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import Joint, Optimum, optimum, optimum_from_outputs
from distil_rank.core.metric import damped
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
    metrics: dict[str, Tensor] = field(default_factory=dict)  # G by layer; none: the identity

    @property
    def moments(self) -> Moments:
        """Of all folds together."""
        return self.folds[0] if len(self.folds) == 1 else merged(self.folds)

    def solve(self, site: Site, moments: Moments, rank: int | None = None) -> Optimum:
        """Closed-form students of a site, in its metric, from moments of this side."""
        closed_form = optimum if self.side == "input" else optimum_from_outputs
        return closed_form(site.weight, site.bias, moments, rank, self.metrics.get(site.name))


def collect(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    folds: int = 1,
    memory: int = MEMORY,
    inputs_only: bool = False,
    loss: Loss | None = None,
) -> Iterator[Statistics]:
    """Statistics of the sites in groups of at most `memory` bytes, one pass over the batches each.

    Protein i belongs to fold i modulo `folds`; where rows are not by protein, batch i does. loss:
    with the metric of each layer (`fisher`), at the cost of a backward pass.
    """
    for group in groups(sites, folds, memory, inputs_only, loss is not None):
        proteins = 0
        into = {s.sites[0].name: s for s in group}
        for index, batch in enumerate(batches):
            tokens = tokens_of(batch)
            fold_of = proteins + torch.arange(0 if tokens is None else len(tokens))
            proteins, fold_of = proteins + len(fold_of), fold_of % folds

            def see(
                site: Site,
                read: Read,
                i: int = index,
                fold_of: Tensor = fold_of,
                into: Mapping[str, Statistics] = into,
            ) -> None:
                known = into[site.name]
                whole = folds == 1 or len(read(known.side, fold_of < 0)) > 0  # not by protein
                for fold in [i % folds] if whole else fold_of.unique().tolist():
                    rows = read(known.side, None if whole else fold_of == fold)
                    update(known.folds[fold], rows, site.name)

            observe(model, batch, [s.sites[0] for s in group], see)
        for statistics in group:
            seen = sum(m.count for m in statistics.folds)
            if seen < 2:
                raise InputError(
                    f"at least 2 calibration tokens required, layer {statistics.sites[0].name} saw"
                    f" {seen:.0f}; give proteins"
                )
        if loss is not None:
            found = metrics(model, batches, [site for s in group for site in s.sites], loss)
            for statistics in group:
                statistics.metrics.update({s.name: found[s.name] for s in statistics.sites})
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
    sites: Sequence[Site], folds: int, memory: int, inputs_only: bool, metric: bool = False
) -> Iterator[list[Statistics]]:
    """Empty moments of layers in running order, in groups that fit into `memory` bytes."""
    readers: dict[tuple[int, int], list[Site]] = {}
    for site in sites:
        readers.setdefault(site.input, []).append(site)
    group: list[Statistics] = []
    used = 0
    for members in readers.values():
        of_inputs = inputs_only or any(s.of_inputs for s in members)
        shared = of_inputs or members[0].d_in ** 2 <= sum(s.d_out**2 for s in members)
        units = [members] if shared else [[s] for s in members]
        for unit in units:
            dim = unit[0].d_in if shared else unit[0].d_out
            size = 8 * (dim**2 * folds + metric * sum(s.d_out**2 for s in unit))
            if group and used + size > memory:
                yield group
                group, used = [], 0
            moments = [Moments(dim, unit[0].weight.device) for _ in range(folds)]
            group.append(Statistics("input" if shared else "output", unit, moments))
            used += size
    if group:
        yield group


@dataclass(frozen=True)
class Fidelity:
    """One layer's student as stored, on the teacher's own inputs."""

    fvu: float
    loss: float  # in the layer's metric, over that of a constant
    floor: float  # no student of this rank is below it in that metric on these rows


def measure(
    model: nn.Module,
    students: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    sites: Sequence[Site],
    memory: int = MEMORY,
    loss: Loss | None = None,
    neurons: Mapping[str, Tensor] | None = None,
) -> dict[str, Fidelity]:
    """What every student loses on the dense model's activations, and no student avoids.

    neurons: which a student reads that does not read all.
    """
    chosen = [s for s in sites if s.name in students]
    found = {}
    for statistics in collect(model, batches, chosen, 1, memory, inputs_only=True, loss=loss):
        moments = statistics.moments
        for site in statistics.sites:
            student: Any = students[site.name]
            metric = statistics.metrics.get(site.name)
            metric = None if metric is None else damped(metric)
            kept = (neurons or {}).get(site.name)
            if kept is None:
                floor = float(statistics.solve(site, moments, student.rank).fvu[student.rank])
            else:
                joint = Joint.of_layer(site.weight, site.bias, moments)
                best = refitted(joint, kept, site.weight[:, kept])
                floor = student_fvu(site, unpruned(*best, kept, site.d_in), moments, metric)
                student = unpruned(student.weight, student.bias, kept, site.d_in)
            fvu, lost = (student_fvu(site, student, moments, m) for m in (None, metric))
            found[site.name] = Fidelity(fvu, lost, floor)
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
