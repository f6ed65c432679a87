"""Blocks compressed one after the other, each fitted on what the compressed blocks before it really put out.

The student of a layer reads x~, the activations of the model compressed so far, and imitates y, the output of the dense model, so
that it also corrects the drift (`solutions.drifted_student`). Ranks are chosen beforehand.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from distil_rank.compress.calibration import Mask, update
from distil_rank.compress.sites import Batch, Call, Site, call, evaluating, read_mask, rows_of, watching
from distil_rank.core.lowrank import Drift, Spectrum, drifted_student
from distil_rank.core.moments import Moments


class _Reached(Exception):
    """The last layer of a block has run: the rest of the forward pass is not needed."""


def blocks(sites: Sequence[Site], calls: Mapping[str, Call]) -> list[list[Site]]:
    """Sites in running order, split where the first number in the name changes: `layers.3.`, `encoder.layer.3.`, `h.3.`."""

    def block(name: str) -> str:
        match = re.match(r"(.*?\.)?\d+(\.|$)", name)
        return match.group(0) if match else name

    ordered = sorted(sites, key=lambda s: calls[s.name].order)
    result: list[list[Site]] = []
    for site in ordered:
        if not result or block(result[-1][0].name) != block(site.name):
            result.append([])
        result[-1].append(site)
    return result


def sequential_students(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    calls: dict[str, Call],
    ranks: Mapping[str, int | None],
    spectra: Mapping[str, Spectrum],
    mask: Mask | None = None,
) -> nn.Module:
    """The compressed model, block by block; the first block, whose inputs nothing has changed, keeps the plain optimum."""
    chosen = [s for s in sites if ranks[s.name]]
    small = copy.deepcopy(model, {id(s.module): s.module for s in chosen})  # dense layers are shared until replaced
    for index, block in enumerate(blocks(chosen, calls)):
        drifts = _drifts(model, small, batches, block, calls, mask) if index else {}
        for site in block:
            rank = ranks[site.name]
            assert rank is not None
            if index:
                student = drifted_student(site.weight, drifts[site.name], rank).to(site.weight)
            else:
                student = spectra[site.name].student(site.weight, site.bias, rank)
            small.set_submodule(site.name, student.train(site.module.training))
    return small


def _drifts(
    model: nn.Module,
    small: nn.Module,
    batches: Sequence[Batch],
    block: Sequence[Site],
    calls: dict[str, Call],
    mask: Mask | None,
) -> dict[str, Drift]:
    """Joint moments of [x~, y] for the layers of one block."""
    joint = {s.name: Moments(s.d_in + s.d_out) for s in block}
    for batch in batches:
        kept = read_mask(model, batch) if mask is None else mask(batch)
        outputs = _run(model, batch, block, calls, kept, "output")
        inputs = _run(small, batch, block, calls, kept, "input")
        for site in block:
            update(joint[site.name], torch.cat([inputs[site.name], outputs[site.name]], 1), site.name)
    return {s.name: Drift.of(joint.pop(s.name), s.d_in) for s in block}


def _run(
    model: nn.Module, batch: Batch, block: Sequence[Site], calls: dict[str, Call], kept: Tensor | None, side: str
) -> dict[str, Tensor]:
    """Inputs or outputs of a block's layers in one forward pass, which ends where the block does."""
    rows: dict[str, Tensor] = {}

    def see(site: Site, x: Tensor, y: Tensor) -> None:
        rows[site.name] = rows_of(x if side == "input" else y, calls[site.name].layout, kept)
        if len(rows) == len(block):
            raise _Reached

    with evaluating(model), watching(block, see), torch.no_grad(), suppress(_Reached):
        call(model, batch)
    return rows
