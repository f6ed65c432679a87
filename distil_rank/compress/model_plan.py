"""What to do with each linear layer of a model: is the request possible, and which ranks keep it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distil_rank.core.errors import InputError
from distil_rank.compress.ranks import METHODS, Allocation, Layer, allocate
from distil_rank.compress.sites import Site
from distil_rank.core.lowrank import Spectrum


def check_request(batches: list, ratio: float | None, ranks: Any, method: str, unit: str) -> None:
    if not batches:
        raise InputError("at least one calibration batch required, got none; give proteins")
    if (ratio is None) == (ranks is None):
        raise InputError(f"exactly one of ratio and ranks required, got ratio={ratio}, ranks={ranks}")
    if ratio is not None and not 0 < ratio <= 1:
        raise InputError(f"ratio must be above 0 and at most 1, got {ratio}; 0.5 halves the linear layers")
    if method not in METHODS:
        raise InputError(f"a method out of {', '.join(METHODS)} required, got {method!r}")
    if unit not in ("parameters", "flops"):
        raise InputError(f"unit parameters or flops required, got {unit!r}")


def rank_limit(site: Site, never_slower: bool) -> int:
    """Largest rank worth solving for: factors smaller than the dense layer, or any."""
    full = min(site.d_in, site.d_out)
    return min(full, (site.parameters - 1) // (site.d_in + site.d_out)) if never_slower else full


def rank_guess(ranks: Any, ratio: float | None) -> Callable[[Site], int]:
    """A rank near the final one, at which the weight of a prior is chosen."""

    def guess(site: Site) -> int:
        if ratio is not None:
            return max(1, int(ratio * site.parameters / (site.d_in + site.d_out)))
        rank = ranks if isinstance(ranks, int) else ranks.get(site.name)
        return max(1, min(rank or 1, site.d_in, site.d_out))

    return guess


def choose_ranks(
    sites: Sequence[Site],
    spectra: Mapping[str, Spectrum],
    ratio: float | None,
    ranks: int | Mapping[str, int | None] | None,
    method: str,
    importance: Mapping[str, float],
    rows: Mapping[str, float],
    never_slower: bool,
) -> tuple[dict[str, Any] | None, dict[str, int | None]]:
    """Rank by name (None: dense) and, where they were allocated, the certificate."""
    if ranks is not None:
        chosen: dict[str, int | None] = {}
        for site in sites:
            rank = ranks if isinstance(ranks, int) else ranks.get(site.name)
            if rank is not None and rank < 1:
                raise InputError(f"a rank of at least 1 required, got {rank} for layer {site.name}")
            rank = None if rank is None else min(rank, site.d_in, site.d_out)
            chosen[site.name] = rank if rank is not None and rank <= rank_limit(site, never_slower) else None
        return None, chosen
    assert ratio is not None
    layers = [
        Layer(s.name, s.d_in, s.d_out, _tails(spectra.get(s.name)), importance.get(s.name), rows[s.name]) for s in sites
    ]
    found: Allocation = allocate(layers, ratio * sum(x.dense_cost for x in layers), method)
    fields = ("budget", "cost", "loss", "bound", "gap", "multiplier")
    return {name: float(getattr(found, name)) for name in fields}, found.ranks


def _tails(spectrum: Spectrum | None):
    return torch.zeros(1).numpy() if spectrum is None else spectrum.tails.cpu().numpy()
