"""Blocks compressed one after the other, each fitted to what the compressed blocks before it do.

The student of a layer reads x~, the activations of the model compressed so far, and imitates y, the
output of the dense model, so that it also corrects the drift (`core.lowrank.Joint`). Ranks are
chosen beforehand.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from distil_rank.compress.calibration import update
from distil_rank.compress.neurons import PrunedMLP
from distil_rank.compress.sites import Batch, Read, Site, observe
from distil_rank.core.lowrank import Joint, Optimum
from distil_rank.core.moments import Moments


class _Reached(Exception):
    """The last layer of a block has run: the rest of the forward pass is not needed."""


def blocks(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites in running order, split where the first number in the name changes: `layers.3.`."""

    def block(name: str) -> str:
        match = re.match(r"(.*?\.)?\d+(\.|$)", name)
        return match.group(0) if match else name

    result: list[list[Site]] = []
    for site in sites:
        if not result or block(result[-1][0].name) != block(site.name):
            result.append([])
        result[-1].append(site)
    return result


def sequential_students(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    ranks: Mapping[str, int | None],
    cut: Mapping[str, PrunedMLP],
    solved: Mapping[str, Optimum],
    metrics: Mapping[str, Tensor],
) -> nn.Module:
    """The compressed model, block by block.

    The first block, whose inputs nothing has changed, keeps the plain optimum.
    """
    pruned = {s.name for mlp in cut.values() for s in mlp.sites}
    chosen = [s for s in sites if ranks[s.name] or s.name in pruned]
    # dense layers are shared until they are replaced
    small = copy.deepcopy(model, {id(s.module): s.module for s in chosen})
    for index, block in enumerate(blocks(chosen)):
        joints = _joints(model, small, batches, block) if index else {}
        students: dict[str, nn.Module] = {}
        for site in block:
            if site.name in cut:
                students |= cut[site.name].layers(joints)
            rank = ranks[site.name]
            if rank is None:
                continue
            best = solved[site.name]
            if index:
                best = joints[site.name].optimum(
                    site.weight, metric=metrics.get(site.name), rank=rank
                )
            student = best.student(rank).to(site.weight)
            students[site.name] = student.train(site.module.training)
        for name, part in students.items():
            small.set_submodule(name, part)
    return small


def _joints(
    model: nn.Module,
    small: nn.Module,
    batches: Sequence[Batch],
    block: Sequence[Site],
) -> dict[str, Joint]:
    """Joint moments of [x~, y] for the layers of one block."""
    device = block[0].weight.device
    joint = {s.name: Moments(s.d_in + s.d_out, device) for s in block}
    for batch in batches:
        outputs = _run(model, batch, block, "output")
        inputs = _run(small, batch, block, "input")
        for site in block:
            rows = torch.cat([inputs[site.name], outputs[site.name]], 1)
            update(joint[site.name], rows, site.name)
    return {s.name: Joint.of(joint.pop(s.name), s.d_in) for s in block}


def _run(
    model: nn.Module,
    batch: Batch,
    block: Sequence[Site],
    side: str,
) -> dict[str, Tensor]:
    """Inputs or outputs of a block's layers in a forward pass, which ends where the block does."""
    rows: dict[str, Tensor] = {}

    def see(site: Site, read: Read) -> None:
        rows[site.name] = read(side)  # the model may change it before the block ends
        if len(rows) == len(block):
            raise _Reached

    with suppress(_Reached):
        observe(model, batch, block, see)
    return rows
