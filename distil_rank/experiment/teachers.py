"""Teachers: the linear layers y = W x + c that students are made of."""

import math

import torch
from torch import Tensor, nn

from distil_rank.core.linear import linear
from distil_rank.core.randomness import generator

SPECTRAL_DECAY = 100.0  # singular values of the spectral teacher: 2 exp(-i / 100)


def random_teacher(dim: int, seed: int) -> nn.Linear:
    """Torch's default layer: Kaiming uniform with a = sqrt 5, U(+-1/sqrt d), and such a bias."""
    source = generator(seed, "random teacher")
    bound = 1 / math.sqrt(dim)
    weight, bias = torch.rand(dim, dim, generator=source), torch.rand(dim, generator=source)
    return linear((2 * weight - 1) * bound, (2 * bias - 1) * bound)


def spectral_teacher(dim: int, seed: int) -> nn.Linear:
    """U diag(2 exp(-i / 100)) V^T with orthogonal U and V, zero bias."""
    source = generator(seed, "spectral teacher")
    U, V = (torch.linalg.qr(torch.randn(dim, dim, generator=source)).Q for _ in range(2))
    return linear((U * 2 * torch.exp(-torch.arange(dim) / SPECTRAL_DECAY)) @ V.T, torch.zeros(dim))


def task_trained_teachers(
    x: Tensor,
    seeds: list[int],
    steps: int = 500,
    lr: float = 1e-3,
    batch: int = 64,
    noise: float = 0.3,
) -> list[nn.Linear]:
    """Denoisers, one a seed: Adam on the MSE of x predicted from x + noise * randn; x (n, d).

    They train together. The gradient is written out; a test holds it against autograd.
    """
    n, d = x.shape
    start = [random_teacher(d, seed) for seed in seeds]
    weight = torch.stack([t.weight.detach() for t in start]).to(x)
    bias = torch.stack([t.bias.detach() for t in start]).to(x)[:, None]
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer = torch.optim.Adam([weight, bias], lr=lr, fused=True)
    draws = [generator(seed, "task-trained teacher") for seed in seeds]
    for _ in range(steps):
        rows = torch.stack([torch.randint(n, (batch,), generator=g) for g in draws]).to(x.device)
        noises = torch.stack([torch.randn(batch, d, generator=g) for g in draws]).to(x)
        clean = x[rows]
        noisy = clean + noise * noises
        gradient = (torch.baddbmm(bias, noisy, weight.mT) - clean) * (2 / (batch * d))
        torch.bmm(gradient.mT, noisy, out=weight.grad)
        torch.sum(gradient, 1, keepdim=True, out=bias.grad)
        optimizer.step()
    return [linear(w.clone(), b.flatten().clone()) for w, b in zip(weight, bias)]
