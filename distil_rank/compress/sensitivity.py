"""How much the model's own loss cares about an error in each layer.

An error e in the output y of a layer raises the loss by about e^T F e / 2, where F = E[g g^T] is
the Fisher matrix of g = d loss / d y (Martens, JMLR 21, 2020). With F replaced by its mean
diagonal, layer l weighs E|g_l|^2 / d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distil_rank.compress.sites import (
    Batch,
    Site,
    evaluating,
    read_mask,
    rows_of,
    watching,
)
from distil_rank.core.errors import InputError

Loss = Callable[[nn.Module, Batch], Tensor]  # summed over the predicted tokens of a batch


def layer_importance(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    loss: Loss,
) -> dict[str, float]:
    """Weight of one unit of squared error in each layer."""
    named = {s.name: s for s in sites}
    squares = {s.name: 0.0 for s in sites}
    rows = {s.name: 0 for s in sites}
    for batch in batches:
        kept = read_mask(model, batch)
        probes: dict[str, Tensor] = {}

        def add_probe(
            site: Site, x: Tensor, y: Tensor, probes: dict[str, Tensor] = probes
        ) -> Tensor:
            probes[site.name] = torch.zeros_like(y, requires_grad=True)
            return y + probes[site.name]  # not a leaf: models may scale it in place

        with evaluating(model), watching(sites, add_probe), torch.enable_grad():
            value = loss(model, batch)
            gradients = torch.autograd.grad(value, list(probes.values()), allow_unused=True)
        for name, gradient in zip(probes, gradients):
            if gradient is not None:
                found = rows_of(gradient, named[name], kept)
                squares[name] += float(found.double().square().sum())
                rows[name] += len(found)
    weights = {s.name: squares[s.name] / max(1, rows[s.name]) / s.d_out for s in sites}
    if not all(w < float("inf") for w in weights.values()) or not any(weights.values()):
        raise InputError(
            "a finite loss that depends on the layers required for sensitivity, got none"
        )
    return weights
