"""Embedding stores as row-wise aligned sources, and the embedding of a FASTA with every model of a family, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.proteins.checkpoints import FAMILIES
from distil_rank.proteins.store import EmbeddingStore


class StoreRows:
    """Rows of a store of residues (or of one vector per protein), read run by run; at one layer (default: the last)."""

    def __init__(self, path: str | Path, layer: int | None = None):
        self.store = EmbeddingStore(path, layer)
        self.dim = self.store.dim
        self.lengths: Sequence[int] = self.store.column("rows")
        self.keys: Sequence[str] = self.store.column("sha256")
        self._shard, self._first = self.store.column("shard"), self.store.column("first_row")

    def read(self, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:  # one slice per shard
            shard = self._shard[start]
            last = start
            while last + 1 < stop and self._shard[last + 1] == shard:
                last += 1
            first_row = self._first[start]
            parts.append(self.store.read_rows(shard, first_row, self._first[last] + self.lengths[last] - first_row))
            start = last + 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Source:
    """Where the raw embeddings of one size come from."""

    size: str  # the name in the chain
    model: str  # what `load_model` takes


def family_sources(family: str, upto: str | None) -> list[Source]:
    """The models of a family, smallest first, up to and including one size."""
    if family not in FAMILIES:
        raise InputError(f"a family of {', '.join(FAMILIES)} required, got {family!r}")
    sizes = FAMILIES[family]
    if upto is not None and upto not in sizes:
        raise InputError(f"a size of {', '.join(sizes)} required for the family {family}, got {upto!r}")
    names = list(sizes)[: None if upto is None else list(sizes).index(upto) + 1]
    if len(names) < 2:
        raise InputError(f"at least two sizes required, got {', '.join(names)}; go up to a larger one")
    return [Source(name, sizes[name].name) for name in names]


def store_provenance(stores: Mapping[str, EmbeddingStore]) -> dict[str, dict[str, Any]]:
    """What a chain records of the stores it was fitted on, by size."""
    kept = ("model", "weights_sha256", "pool", "dim", "dtype", "compute", "long", "max_length")
    return {size: {key: store.provenance[key] for key in kept} for size, store in stores.items()}
