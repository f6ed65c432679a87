"""Rows and teachers for the tests of the closed forms."""

import torch
from torch import Tensor, nn

from benchmarks.lowrank import difficult


def draw(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def rows(kind: str = "plain", n: int = 90, d: int = 24) -> Tensor:
    """Correlated rows (n, d) with a large mean, and the difficulty that the name says."""
    return difficult(draw(n, d, seed=3) @ draw(d, d, seed=4) + 5 * draw(d, seed=5))[kind]


KINDS = list(difficult(draw(2, 1)))


def layer(d_out: int = 24, d_in: int = 24, bias: bool = True, seed: int = 7) -> nn.Linear:
    """A float64 layer, the same for the same seed."""
    made = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(draw(*p.shape, seed=seed + i) / d_in**0.5)
    return made


def loss(prediction: Tensor, y: Tensor) -> float:
    """Mean over rows of the squared error, summed over features."""
    return float((prediction - y).detach().square().sum(1).mean())
