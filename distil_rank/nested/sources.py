"""Where the raw embeddings of each size come from: the models of a chain, found and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.rows import StoreRows
from distil_rank.proteins import command_embed
from distil_rank.proteins.checkpoints import FAMILIES, Loaded, load_model
from distil_rank.proteins.fasta import read_fasta, write_fasta


def family_sources(family: str, upto: str | None) -> dict[str, str]:
    """Models of a family by size, smallest first, up to and including one size."""
    if family not in FAMILIES:
        raise InputError(f"a family of {', '.join(FAMILIES)} required, got {family!r}")
    sizes = FAMILIES[family]
    if upto is not None and upto not in sizes:
        known = ", ".join(sizes)
        raise InputError(f"a size of {known} required for the family {family}, got {upto!r}")
    names = list(sizes)[: None if upto is None else list(sizes).index(upto) + 1]
    if len(names) < 2:
        got = ", ".join(names)
        raise InputError(f"at least two sizes required, got {got}; go up to a larger one")
    return {name: sizes[name] for name in names}


def named_sources(models: Sequence[str]) -> dict[str, str]:
    """Models by name or path, smallest first; a size is called as its file or model."""
    names = [Path(m).stem if m.endswith(".pt") else Path(m).name for m in models]
    if models and (len(models) < 2 or len(set(names)) < len(names)):
        got = ", ".join(names)
        raise InputError(f"two or more models of different names required, got {got}")
    return dict(zip(names, models))


@dataclass(frozen=True)
class Loader:
    """Loads the model of one size on demand; InputError if the chain was fitted on another one."""

    size: str
    source: str  # what `load_model` takes
    width: int
    weights: str | None  # SHA-256 of those that the chain was fitted on, where it was told

    def load(self, device: torch.device | str = "cpu") -> Loaded:
        loaded = load_model(self.source, device)
        if loaded.model.width != self.width:
            required = f"a model of {self.width} features required for {self.size}"
            raise InputError(f"{required}, got {loaded.model.width} in {self.source}")
        if self.weights not in (None, loaded.sha256):
            raise InputError(
                f"the weights that the chain was fitted on required for {self.size} (SHA-256"
                f" {str(self.weights)[:12]}...), got others in {self.source}"
                f" ({loaded.sha256[:12]}...); fit the chain again"
            )
        return loaded


def chain_models(
    chain: NestedChain, models: Sequence[str] = (), dim: int | None = None
) -> dict[str, Loader]:
    """How to load the model of each size that an embedding of `dim` needs.

    `models` replaces the sources that the chain remembers, smallest first.
    """
    remembered = chain.record.get("models", {})
    if len(models) > len(chain.sizes):
        known = ", ".join(chain.sizes)
        raise InputError(f"at most one model for each of {known} required, got {len(models)}")
    sources = dict(zip(chain.sizes, models))
    if not models:
        sources = {size: known["source"] for size, known in remembered.items()}
    needed = chain.sizes_for(dim)
    if missing := [size for size in needed if size not in sources]:
        required, got = ", ".join(needed), ", ".join(missing)
        remedy = "name them with --models"
        raise InputError(f"models for {required} required, got none for {got}; {remedy}")
    return {
        size: Loader(
            size, sources[size], chain.widths[size], remembered.get(size, {}).get("weights_sha256")
        )
        for size in needed
    }


def raw_store(fasta: Path, model: str, out: Path, pool: Any, config: Any) -> StoreRows:
    """Embed proteins with one model, or complete the store that was begun.

    `config` is that of the command, whose flags of embedding are those of `distil-rank embed`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    shared = "store_dtype", "long", "max_length", "device"
    options = {name: getattr(config, name) for name in shared if hasattr(config, name)}
    command_embed.run(command_embed.Config(fasta, model, out, pool, **options))
    return StoreRows(out)


def sample(fasta: Path, out: Path, count: int, seed: int) -> None:
    """Write at most `count` proteins of a FASTA, drawn at random, in file order, to `out`."""
    found = sum(1 for _ in read_fasta(fasta))
    chosen = set(torch.randperm(found, generator=generator(seed, "proteins"))[:count].tolist())
    write_fasta(out, (protein for i, protein in enumerate(read_fasta(fasta)) if i in chosen))
