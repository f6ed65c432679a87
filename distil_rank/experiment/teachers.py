"""Teachers: the linear layers y = W x + c that students are made of."""

import math

import torch
from torch import Tensor, nn

from distil_rank.core.linear import linear
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import Record

SPECTRAL_DECAY = 100.0  # singular values of the spectral teacher: 2 exp(-i / 100)
NOISE = 0.3  # of the denoising task, in standard deviations of each feature
TRAINED = 0.8  # a denoiser is called trained below this share of a constant's error
LEARNING_RATE, BATCH = 3e-3, 64  # of denoisers


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


def task_trained_teachers(x: Tensor, seeds: list[int], steps: int = 500) -> list[nn.Linear]:
    """Denoisers, one a seed: Adam on the MSE of x predicted from x + e; x (n, d).

    e is Gaussian, NOISE of each feature's standard deviation. They train together, on x - mean x,
    at a learning rate that falls linearly to 0. The gradient is written out; a test holds it
    against autograd.
    """
    n, d = x.shape
    mean, noise = x.mean(0), NOISE * x.std(0, correction=0)
    weight = torch.stack([random_teacher(d, seed).weight.detach() for seed in seeds]).to(x)
    bias = weight.new_zeros(len(seeds), 1, d)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE, fused=True)
    draws = [generator(seed, "task-trained teacher") for seed in seeds]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        rows = torch.stack([torch.randint(n, (BATCH,), generator=g) for g in draws]).to(x.device)
        noises = torch.stack([torch.randn(BATCH, d, generator=g) for g in draws]).to(x)
        clean = x[rows] - mean
        noisy = clean + noise * noises
        gradient = (torch.baddbmm(bias, noisy, weight.mT) - clean) * (2 / (BATCH * d))
        torch.bmm(gradient.mT, noisy, out=weight.grad)
        torch.sum(gradient, 1, keepdim=True, out=bias.grad)
        optimizer.step()
    biases = bias[:, 0] + mean - weight @ mean
    return [linear(w.clone(), b.clone()) for w, b in zip(weight, biases)]


def denoising(teachers: list[nn.Linear], x: Moments, x_val: Moments) -> Record:
    """How well denoisers do their task on held-out rows, exactly: MSE averaged over all noise.

    Beside the constant mean of the training rows, and the Wiener filter, the best linear denoiser
    for the training rows' moments. `trained`: every seed is below TRAINED of the constant.
    """
    S, mu = x.covariance, x.mean
    noise = NOISE**2 * S.diagonal()
    eye = torch.eye(len(S)).to(S)

    def mse(W: Tensor, b: Tensor) -> float:
        error, shift = W - eye, (W - eye) @ x_val.mean + b
        signal = ((error @ x_val.covariance) * error).sum() + shift @ shift
        return float(signal + (W.square() * noise).sum()) / len(S)

    jitter = 1e-12 * S.trace() * eye  # features that never vary
    wiener = torch.linalg.solve(S + noise.diag() + jitter, S).T
    found = [mse(t.weight.detach().to(S), t.bias.detach().to(S)) for t in teachers]
    constant = mse(torch.zeros_like(S), mu)
    return {
        "noise": NOISE,
        "mse": sum(found) / len(found),
        "mse_per_seed": found,
        "constant_mse": constant,
        "wiener_mse": mse(wiener, mu - wiener @ mu),
        "trained": max(found) < TRAINED * constant,
        "higher_is_better": False,
    }
