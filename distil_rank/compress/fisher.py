"""The metric of a model's function: what the rest of the model makes of an error in a layer.

An error e in a layer's output y raises the model's loss by about e^T G e / 2, with G = E[g g^T] and
g = d loss / d y. Where the loss is the negative log likelihood of labels drawn from the model, G is
the Fisher matrix (Martens, JMLR 21, 2020) and that is the divergence from the dense model. Where it
is v . h, for the model's output h and random v of unit covariance, e^T G e is E |dh|^2 (`probed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.compress.sites import Batch, Site, call, evaluating, read_mask, rows_of, watching
from distil_rank.core.errors import InputError
from distil_rank.core.metric import damped
from distil_rank.core.randomness import generator

Loss = Callable[[nn.Module, Batch, torch.Generator], Tensor]  # a sum; draws with the generator
DAMPING = 1e-2  # of the mean of G's diagonal


def metrics(
    model: nn.Module, batches: Sequence[Batch], sites: Sequence[Site], loss: Loss
) -> dict[str, Tensor]:
    """G (d_out, d_out) by layer, damped, in float64; zero where the loss does not depend on one."""
    named = {s.name: s for s in sites}
    sums = {s.name: s.weight.new_zeros(s.d_out, s.d_out, dtype=torch.float64) for s in sites}
    rows = dict.fromkeys(named, 0)
    draws = generator(0, "labels drawn from the model")
    for batch in batches:
        kept = read_mask(model, batch)
        probes: list[tuple[str, Tensor]] = []

        def add_probe(
            site: Site, x: Tensor, y: Tensor, probes: list[tuple[str, Tensor]] = probes
        ) -> Tensor:
            probes.append((site.name, torch.zeros_like(y, requires_grad=True)))
            return y + probes[-1][1]  # not a leaf: models may scale it in place

        with frozen(model), watching(sites, add_probe), torch.enable_grad():
            value = loss(model, batch, draws)
            if not value.requires_grad:
                raise InputError("a loss that depends on the model's layers required, got none")
            zeros = [probe for _, probe in probes]
            gradients = torch.autograd.grad(value, zeros, allow_unused=True)
        for (name, probe), gradient in zip(probes, gradients):
            g = rows_of(probe if gradient is None else gradient, named[name], kept).float()
            sums[name] += g.T @ g
            rows[name] += len(g)
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise InputError(f"a finite gradient of the loss required, layer {name} has none")
    return {name: damped(total / max(1, rows[name]), DAMPING) for name, total in sums.items()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of parameters: inputs need not be kept, nor stay as is."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def probed(model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
    """v . h for everything that the model returns, v normal: G is that of its squared error."""
    mask = read_mask(model, batch)
    total: Any = 0.0
    for h in outputs_of(call(model, batch)):
        v = torch.randn(h.shape, generator=draws).to(h)
        if mask is not None and h.shape[:2] == mask.shape:
            v = v * mask.reshape(*mask.shape, *[1] * (h.ndim - 2)).to(h)
        total = total + (v * h).sum()
    if not isinstance(total, Tensor):
        raise InputError("a model that returns tensors required for its metric; give a loss")
    return total


def outputs_of(found: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in what a model returns."""
    if isinstance(found, Tensor):
        if found.is_floating_point():
            yield found
        return
    parts: Any = ()
    if isinstance(found, Mapping):
        parts = found.values()
    elif isinstance(found, tuple | list):
        parts = found
    elif is_dataclass(found):
        parts = [getattr(found, field.name) for field in fields(found)]
    for part in parts:
        yield from outputs_of(part)
