"""Smaller protein language models, with a certificate of what was lost."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distil_rank.layers.heads import compress_head
    from distil_rank.layers.lowrank import LowRankLinear, compress_linear, truncated_svd
    from distil_rank.layers.models import compress_model
    from distil_rank.layers.storage import load
    from distil_rank.nested.chain import NestedChain
    from distil_rank.statistics.moments import Moments

__all__ = [
    "LowRankLinear",
    "Moments",
    "NestedChain",
    "compress_head",
    "compress_linear",
    "compress_model",
    "load",
    "truncated_svd",
]

_HOMES = {
    "LowRankLinear": "distil_rank.layers.lowrank",
    "Moments": "distil_rank.statistics.moments",
    "NestedChain": "distil_rank.nested.chain",
    "compress_head": "distil_rank.layers.heads",
    "compress_linear": "distil_rank.layers.lowrank",
    "compress_model": "distil_rank.layers.models",
    "load": "distil_rank.layers.storage",
    "truncated_svd": "distil_rank.layers.lowrank",
}


def __getattr__(name: str) -> object:
    """Import on first use, so that the command line answers without loading torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'distil_rank' has no attribute {name!r}")
