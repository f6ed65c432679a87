"""Embedding stores as row-wise aligned sources, and the embedding of a FASTA with every model of a family, one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.nested.chain import NestedChain
from distil_rank.proteins.checkpoints import FAMILIES, Loaded, load_model
from distil_rank.proteins.fasta import read_fasta, write_fasta
from distil_rank.proteins.store import EmbeddingStore, shard_path
from distil_rank.core.randomness import generator


class StoreRows:
    """Rows of a store of residues (or of one vector per protein), read run by run; at one layer (default: the last)."""

    def __init__(self, path: str | Path, layer: int | None = None):
        self.store = EmbeddingStore(path, layer)
        self._tensor = f"layer_{self.store.provenance['layers'][-1] if layer is None else layer}"
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
            parts.append(self.read_shard(shard, first_row, self._first[last] + self.lengths[last] - first_row))
            start = last + 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_shard(self, shard: int, start: int, rows: int) -> Tensor:
        """Rows (rows, d) of one shard."""
        return read_slice(shard_path(self.store.path, shard), self._tensor, start, rows)

    def shard_sizes(self) -> list[int]:
        """Rows of every shard."""
        sizes = [0] * self.store.provenance["shards"]
        for shard, rows in zip(self._shard, self.lengths):
            sizes[shard] += rows
        return sizes


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_slice(path: Path, tensor: str, start: int, rows: int) -> Tensor:
    """Rows (rows, d) of a two-dimensional tensor in a safetensors file, by plain reading.

    Not by mapping: a pass over mapped shards counts every one of them as resident memory.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entry = json.loads(file.read(length))[tensor]
            dtype, width = DTYPES[entry["dtype"]], entry["shape"][1]
            file.seek(8 + length + entry["data_offsets"][0] + start * width * dtype.itemsize)
            content = bytearray(rows * width * dtype.itemsize)
            if file.readinto(content) < len(content):
                raise ValueError("the file ends early")
    except (OSError, KeyError, ValueError, struct.error) as error:
        raise InputError(f"a whole shard required, got {path} ({error}); embed again") from None
    return torch.frombuffer(content, dtype=dtype).view(rows, width)


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


def chain_models(chain: NestedChain, models: Sequence[str] = ()) -> dict[str, Loader]:
    """How to load the model of each size of a chain, which must have the weights that the chain was fitted on.

    `models` replaces the sources that the chain remembers, smallest first.
    """
    remembered = chain.record.get("models", {})
    if models and len(models) > len(chain.sizes):
        raise InputError(f"at most one model for each of {', '.join(chain.sizes)} required, got {len(models)}")
    sources = dict(zip(chain.sizes, models)) if models else {k: v["source"] for k, v in remembered.items()}
    if missing := [size for size in chain.sizes if size not in sources and not models]:
        raise InputError(f"a model for each size required, got none for {', '.join(missing)}; name them with --models")
    return {size: Loader(size, source, chain) for size, source in sources.items()}


@dataclass(frozen=True)
class Loader:
    """Loads the model of one size of a chain on demand; InputError if it is not the one that the chain was fitted on."""

    size: str
    source: str
    chain: NestedChain

    def weights(self) -> str:
        """SHA-256 of the weights that the chain was fitted on, or the name of the model where it was not told."""
        return self.chain.record.get("models", {}).get(self.size, {}).get("weights_sha256", self.source)

    def load(self, device: torch.device | str = "cpu") -> Loaded:
        loaded = load_model(self.source, device)
        width = self.chain.widths[self.size]
        if loaded.model.width != width:
            raise InputError(
                f"a model of {width} features required for {self.size}, got {loaded.model.width} in {self.source}"
            )
        fitted = self.chain.record.get("models", {}).get(self.size, {}).get("weights_sha256", loaded.sha256)
        if loaded.sha256 != fitted:
            raise InputError(
                f"the weights that the chain was fitted on required for {self.size} (SHA-256 {fitted[:12]}...), got others in"
                f" {self.source} ({loaded.sha256[:12]}...); fit the chain again"
            )
        return loaded


def store_provenance(stores: Mapping[str, EmbeddingStore]) -> dict[str, dict[str, Any]]:
    """What a chain records of the stores it was fitted on, by size."""
    kept = ("model", "weights_sha256", "pool", "dim", "dtype", "compute", "long", "max_length")
    return {size: {key: store.provenance[key] for key in kept} for size, store in stores.items()}


def named_sources(models: Sequence[str]) -> list[Source]:
    """Models by name or path, smallest first; a size is called as its file or model."""
    sources = [Source(Path(m).stem if m.endswith(".pt") else m.rstrip("/").rpartition("/")[2], m) for m in models]
    names = [source.size for source in sources]
    if models and (len(models) < 2 or len(set(names)) < len(names)):
        raise InputError(f"two or more models of different names required, got {', '.join(names)}")
    return sources


def sample(fasta: Path, out: Path, count: int, seed: int) -> None:
    """Write `count` proteins of a FASTA, drawn at random, in file order, to `out`."""
    if count < 1:
        raise InputError(f"at least one protein required, got --proteins {count}")
    found = sum(1 for _ in read_fasta(fasta))
    if count > found:
        raise InputError(f"at most the {found} proteins of {fasta} required, got --proteins {count}; ask for fewer")
    chosen = set(torch.randperm(found, generator=generator(seed, "proteins"))[:count].tolist())
    write_fasta(out, (protein for i, protein in enumerate(read_fasta(fasta)) if i in chosen))
