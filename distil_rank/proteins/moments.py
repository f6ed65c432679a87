"""Count, mean and covariance of stored embeddings, in one streaming pass: what the closed forms and priors need.

    distil-rank moments store/ --out moments.safetensors
    distil-rank moments residues/ --layer 12 --out moments.safetensors
    torchrun --nproc-per-node 4 -m distil_rank moments store/ --out moments.safetensors

Memory is O(d^2), whatever the number of vectors. Under torchrun each rank reads every n-th shard and the parts are
merged. Read the result with `distil_rank.Moments.load(path)`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distil_rank.distributed import process_group
from distil_rank.errors import InputError
from distil_rank.proteins.store import EmbeddingStore
from distil_rank.records import require_writable
from distil_rank.statistics.moments import Moments


@dataclass(frozen=True)
class Config:
    source: Annotated[Path, tyro.conf.Positional]  # a store written by `distil-rank embed`
    out: Path  # safetensors file to write
    layer: int | None = None  # which of several stored layers (the last one stored, when not given)


def run(config: Config) -> None:
    """Write `config.out`. Raises InputError where there is no store, or it cannot be written."""
    store = EmbeddingStore(config.source, config.layer)
    if config.out.is_dir():
        raise InputError(f"a file name required for --out, got the folder {config.out}; give for instance moments.safetensors")
    require_writable(config.out.parent)
    with process_group() as group:
        moments = Moments(store.dim)
        for rows in store.batches(rank=group.rank, world=group.world):
            moments.update(rows)
        moments = group.merge(moments)
        if group.rank == 0:
            moments.save(config.out, source=store.provenance)
            print(f"{config.out}: moments of {int(moments.count)} vectors of {moments.dim} features")
