"""Count, mean and covariance of embeddings, in one streaming pass: what the closed forms and priors need.

    distil-rank moments store/ --out moments.safetensors
    distil-rank moments embeddings_train.pt --out moments.safetensors      # or .npy, .npz (key X), .safetensors
    distil-rank moments residues/ --layer 12 --out moments.safetensors
    torchrun --nproc-per-node 4 -m distil_rank moments store/ --out moments.safetensors

Memory is O(d^2), whatever the number of vectors in a store. Under torchrun each rank takes its share (of a store, every
n-th shard) and the parts are merged. Read the result with `distil_rank.Moments.load(path)`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from distil_rank.core.devices import Group, process_group
from distil_rank.core.errors import InputError
from distil_rank.proteins.embedding_files import load_matrix
from distil_rank.proteins.embedding_files import provenance as file_provenance
from distil_rank.proteins.store import EmbeddingStore
from distil_rank.core.records import require_writable, sha256
from distil_rank.core.moments import Moments


@dataclass(frozen=True)
class Config:
    source: Annotated[Path, tyro.conf.Positional]  # a store written by `distil-rank embed`, or a file of embeddings
    out: Path  # safetensors file to write
    layer: int | None = None  # which of several stored layers (the last one stored, when not given)


def run(config: Config) -> None:
    """Write `config.out`. Raises InputError where there are no embeddings, or it cannot be written."""
    with process_group() as group:
        dim, batches, provenance = _open(config, group)
        if config.out.is_dir():
            raise InputError(f"a file name required for --out, got the folder {config.out}; add moments.safetensors")
        require_writable(config.out.parent)
        moments = Moments(dim)
        for rows in batches:
            moments.update(rows)
        moments = group.merge(moments)
        if group.rank == 0:
            moments.save(config.out, source=provenance)
            print(f"{config.out}: moments of {int(moments.count)} vectors of {moments.dim} features")


def _open(config: Config, group: Group) -> tuple[int, Iterable[Tensor], dict[str, Any]]:
    """Features d, this rank's batches (n, d), and what is known about the source."""
    if config.source.is_file():
        if config.layer is not None:
            raise InputError(f"a store required for --layer, got the file {config.source}; leave --layer out")
        x = load_matrix(config.source)
        known = {"file": config.source.name, "sha256": sha256(config.source), **file_provenance(config.source)}
        return x.shape[1], [x[group.rank :: group.world]], known
    store = EmbeddingStore(config.source, config.layer)
    return store.dim, store.batches(rank=group.rank, world=group.world), store.provenance
