"""Embeddings that look like a model family's."""

import torch

from distil_rank.core.randomness import generator


def family(
    rows: int = 600, widths=(6, 10, 17), seed: int = 0, dtype=torch.float64, noise: float = 0.3
):
    """Row-aligned embeddings that share latent causes, with a large mean and one outlier feature, as real ones have."""
    draw = generator(seed, "family")
    latent = torch.randn(rows, max(widths), generator=draw, dtype=torch.float64) * torch.logspace(
        0, -1, max(widths)
    )
    raws = {}
    for i, k in enumerate(widths):
        mixing = torch.randn(max(widths), k, generator=draw, dtype=torch.float64)
        x = latent @ mixing + noise * torch.randn(rows, k, generator=draw, dtype=torch.float64) + 3
        x[:, 0] = x[:, 0] * 8 - 20
        raws["abcdefg"[i]] = x.to(dtype)
    return raws
