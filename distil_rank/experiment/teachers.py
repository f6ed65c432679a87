"""Teachers: the linear layers y = W x + c that students are made of."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.proteins.embedding_files import read_tensors
from distil_rank.core.randomness import generator

SPECTRAL_DECAY = 100.0  # singular values of the spectral teacher: 2 exp(-i / 100)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear from weight (d_out, d_in) and bias (d_out,), without drawing random numbers."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def random_teacher(dim: int, seed: int) -> nn.Linear:
    """Kaiming uniform with a = sqrt 5, which is U(+-1/sqrt d), and bias U(+-1/sqrt d): torch's default layer."""
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
    x: Tensor, seeds: list[int], steps: int = 500, lr: float = 1e-3, batch: int = 64, noise: float = 0.3
) -> list[nn.Linear]:
    """Denoisers, one a seed, trained together: Adam on the MSE of x predicted from x + noise * randn; x (n, d)."""
    n, d = x.shape
    start = [random_teacher(d, seed) for seed in seeds]
    weight = torch.stack([t.weight.detach() for t in start]).to(x)
    bias = torch.stack([t.bias.detach() for t in start]).to(x)[:, None]
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimiser = torch.optim.Adam([weight, bias], lr=lr, fused=True)
    sources = [generator(seed, "task-trained teacher") for seed in seeds]
    for _ in range(steps):
        rows = torch.stack([torch.randint(n, (batch,), generator=source) for source in sources]).to(x.device)
        noises = torch.stack([torch.randn(batch, d, generator=source) for source in sources]).to(x)
        clean = x[rows]
        noisy = clean + noise * noises
        gradient = (torch.baddbmm(bias, noisy, weight.mT) - clean) * (2 / (batch * d))  # of the MSE, by the prediction
        torch.bmm(gradient.mT, noisy, out=weight.grad)
        torch.sum(gradient, 1, keepdim=True, out=bias.grad)
        optimiser.step()
    return [linear(w.clone(), b.flatten().clone()) for w, b in zip(weight, bias)]


def load_teacher(path: str | Path, key: str | None = None) -> nn.Linear:
    """A linear layer from a .pt or .safetensors state dict: `KEY.weight` (d_out, d_in) and, if there, `KEY.bias` (d_out,).

    Without a key the file must hold one layer. Nothing is unpickled beyond tensors. Weights come as float32 (float64 stays).
    """
    tensors = read_state_dict(Path(path))
    layers = sorted(name.removesuffix("weight").rstrip(".") for name in tensors if name.split(".")[-1] == "weight")
    if key is None and len(layers) != 1:
        raise InputError(f"one layer or --key required in {path}, got layers {layers or 'none'}; choose one with --key")
    name = layers[0] if key is None else key.removesuffix(".weight")
    prefix = f"{name}." if name else ""
    weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
    if weight is None:
        raise InputError(f"key {name!r} required in {path}, which has layers {layers or 'none'}; choose one with --key")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(
            f"a floating-point weight (d_out, d_in) required, got {weight.dtype} {tuple(weight.shape)} in {path}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"a bias ({len(weight)},) required beside that weight, got {tuple(bias.shape)} in {path}")
    if not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
        raise InputError(f"a finite weight and bias required, got NaN or infinity in {path}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return linear(weight.to(dtype), None if bias is None else bias.to(dtype))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .pt or .safetensors file; a checkpoint's inner dicts ("model", "state_dict") are flattened."""
    if path.suffix not in (".pt", ".safetensors"):
        raise InputError(f"a layer in a .pt or .safetensors file required, got {path}")
    loaded = read_tensors(path)
    if not isinstance(loaded, dict):
        raise InputError(f"a state dict with weight and bias required in {path}, got {type(loaded).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        elif isinstance(value, dict):
            tensors.update({f"{name}.{k}": v for k, v in value.items() if isinstance(v, Tensor)})
    return tensors
