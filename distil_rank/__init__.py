"""Smaller protein language models, with a certificate of what was lost."""

import importlib
from typing import TYPE_CHECKING

from distil_rank.core.imports import AfterImport

if TYPE_CHECKING:
    from distil_rank.compress.heads import compress_head as compress_head
    from distil_rank.compress.models import compress_model as compress_model
    from distil_rank.compress.storage import load as load
    from distil_rank.core.certificates import compress_linear as compress_linear
    from distil_rank.core.functions import distill_function as distill_function
    from distil_rank.core.heads import load_head as load_head
    from distil_rank.core.linear import LowRankLinear as LowRankLinear
    from distil_rank.core.lowrank import truncated_svd as truncated_svd
    from distil_rank.core.moments import Moments as Moments
    from distil_rank.nested.chain import NestedChain as NestedChain
    from distil_rank.proteins.api import embed as embed
    from distil_rank.proteins.checkpoints import load_model as load_model
    from distil_rank.proteins.store import EmbeddingStore as EmbeddingStore

_HOMES = {
    "EmbeddingStore": "proteins.store",
    "LowRankLinear": "core.linear",
    "Moments": "core.moments",
    "NestedChain": "nested.chain",
    "compress_head": "compress.heads",
    "compress_linear": "core.certificates",
    "compress_model": "compress.models",
    "distill_function": "core.functions",
    "embed": "proteins.api",
    "load": "compress.storage",
    "load_head": "core.heads",
    "load_model": "proteins.checkpoints",
    "truncated_svd": "core.lowrank",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import on first use, so that the command line answers without loading torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"distil_rank.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'distil_rank' has no attribute {name!r}")


_AUTO = "transformers.models.auto."
AfterImport(
    (f"{_AUTO}configuration_auto", f"{_AUTO}modeling_auto"), f"{__name__}.compress.auto", "register"
)
