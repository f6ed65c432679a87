"""Smaller protein language models, with a certificate of what was lost."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distil_rank.layers.lowrank import LowRankLinear, compress_linear, truncated_svd
    from distil_rank.statistics.moments import Moments

__all__ = ["LowRankLinear", "Moments", "compress_linear", "truncated_svd"]

_HOMES = {
    "LowRankLinear": "distil_rank.layers.lowrank",
    "Moments": "distil_rank.statistics.moments",
    "compress_linear": "distil_rank.layers.lowrank",
    "truncated_svd": "distil_rank.layers.lowrank",
}


def __getattr__(name: str) -> object:
    """Import on first use, so that the command line answers without loading torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'distil_rank' has no attribute {name!r}")
