"""Count, mean and covariance of embeddings, in one streaming pass, for closed forms and priors.

    distil-rank moments store/ --out moments.safetensors
    distil-rank moments embeddings_train.pt --out moments.safetensors  # .npy, .npz or .safetensors
    distil-rank moments residues/ --layer 12 --out moments.safetensors
    torchrun --nproc-per-node 4 -m distil_rank moments store/ --out moments.safetensors

Memory is O(d^2), whatever the number of vectors in a store. Under torchrun each rank takes its
share (of a store, every n-th shard) and the parts are merged. Read the result with
`distil_rank.Moments.load(path)`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from distil_rank.core.devices import Group, process_group
from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.records import Record, require_writable, sha256
from distil_rank.proteins import embedding_files
from distil_rank.proteins.store import EmbeddingStore


@dataclass(frozen=True)
class Config:
    source: Annotated[Path, tyro.conf.Positional]  # a store, or a file of embeddings
    out: Path  # where to write
    layer: int | None = None  # which of several stored layers (default: the last one stored)
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    """Write `config.out`. InputError where there are no embeddings, or it cannot be written."""
    with process_group(config.device) as group:
        dim, batches, provenance = _open(config, group)
        if config.out.is_dir():
            raise InputError(
                f"a file name required for --out, got the folder {config.out};"
                " add moments.safetensors"
            )
        require_writable(config.out.parent)
        moments = Moments(dim, group.device)
        for rows in batches:
            moments.update(rows)
        moments = group.merge(moments)
        if group.rank == 0:
            moments.save(config.out, source=provenance)
            found = f"{int(moments.count)} vectors of {moments.dim} features"
            print(f"{config.out}: moments of {found}")


def _open(config: Config, group: Group) -> tuple[int, Iterable[Tensor], Record]:
    """Features d, this rank's batches (n, d), and what is known about the source."""
    path = config.source
    if not path.is_file():
        store = EmbeddingStore(path, config.layer)
        return store.dim, store.batches(rank=group.rank, world=group.world), store.provenance
    if config.layer is not None:
        raise InputError(f"a store required for --layer, got the file {path}; leave --layer out")
    x = embedding_files.load_matrix(path)
    known = {"file": path.name, "sha256": sha256(path), **embedding_files.provenance(path)}
    return x.shape[1], [x[group.rank :: group.world]], known
