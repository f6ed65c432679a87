"""Randomness is an argument: one generator per purpose, derived from (seed, purpose)."""

import hashlib

import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Generator for one purpose, so that drawing more for one never changes what another draws."""
    text = "/".join(map(str, (seed, *purpose)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
