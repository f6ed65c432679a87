"""The metric G of the loss E (y - y')^T G (y - y') in which a layer of a head is fitted, by name.

To add one, write a function of what follows the layer and its outputs, and name it in METRICS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

PROBES = 8  # random directions a row

# (parts that follow the layer, its outputs y (n, d), random numbers) -> G (d, d), None: identity
HeadMetric = Callable[[Sequence[nn.Module], Tensor, torch.Generator], Tensor | None]


def own(following: Sequence[nn.Module], y: Tensor, source: torch.Generator) -> Tensor | None:
    """The layer's output itself."""
    return None


def next_layer(following: Sequence[nn.Module], y: Tensor, source: torch.Generator) -> Tensor | None:
    """What the next linear layer makes of it."""
    end = next((i + 1 for i, part in enumerate(following) if isinstance(part, nn.Linear)), 0)
    return squared_jacobian(following[:end], y, source) if end else None


def output(following: Sequence[nn.Module], y: Tensor, source: torch.Generator) -> Tensor | None:
    """What the rest of the head makes of it (Gauss-Newton); the last linear layer has its own."""
    if not any(isinstance(part, nn.Linear) for part in following):
        return None
    return squared_jacobian(following, y, source)


METRICS: dict[str, HeadMetric] = {"own": own, "next": next_layer, "output": output}


def squared_jacobian(parts: Sequence[nn.Module], y: Tensor, source: torch.Generator) -> Tensor:
    """G = E[J^T J] (d, d), J the derivative of what the parts make of y (n, d).

    By random signs: J^T v with independent signs v has J^T J as its second moment, exactly so for
    one output. A single linear part gives G = H^T H.
    """
    if len(parts) == 1 and isinstance(parts[0], nn.Linear):
        H = parts[0].weight.detach().double()
        return H.T @ H
    total = torch.zeros(y.shape[1], y.shape[1], dtype=torch.float64, device=y.device)
    for _ in range(PROBES):
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            result = leaf
            for part in parts:
                result = part(result)
            v = torch.randint(2, result.shape, generator=source).to(result) * 2 - 1
            (gradient,) = torch.autograd.grad((result * v).sum(), leaf)
        gradient = gradient.double()
        total += gradient.T @ gradient
    return total / (PROBES * len(y))
