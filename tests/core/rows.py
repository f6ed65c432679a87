"""Rows and teachers for the tests of the closed forms."""

import torch
from torch import Tensor, nn

KINDS = [
    "plain",
    "n < d",
    "n = d",
    "one null direction",
    "duplicated rows",
    "constant features",
    "features scaled by 1e4",
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def rows(kind: str = "plain", n: int = 90, d: int = 24) -> Tensor:
    """Correlated rows (n, d) with a large mean, and the difficulty that the name says."""
    x = draw(n, d, seed=3) @ draw(d, d, seed=4) + 5 * draw(d, seed=5)
    if kind == "n < d":
        return x[: d // 2]
    if kind == "n = d":
        return x[:d]
    if kind == "one null direction":
        return x - x.mean(1, keepdim=True)  # as after LayerNorm
    if kind == "duplicated rows":
        return x[: d // 3].repeat(5, 1)
    if kind == "constant features":
        x[:, ::3] = 7.0
    if kind == "features scaled by 1e4":
        x[:, ::4] *= 1e4
    return x


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
