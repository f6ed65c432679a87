"""Embed proteins with a nested chain, cut at any dimension: only the models it needs are run.

    distil-rank nested embed proteins.fasta --chain chain/ --dim 640 --out store/
    distil-rank nested embed proteins.fasta --chain chain/ --pool residues --out store/
    torchrun --nproc-per-node 4 -m distil_rank nested embed proteins.fasta --chain chain/ --out s/

The result is an embedding store like any other: `EmbeddingStore("store/")["P69905"]`. Its first
columns are the embedding of the smaller models, bit for bit, unless --normalize divides by the L2
norm after the cut. The nested embedding of a mean is the mean of the nested embeddings, so --pool
mean needs no residues. Interrupted? Run the same command again.
"""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from distil_rank.core.devices import Group, process_group
from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, read_json, require_writable, sha256, write_json
from distil_rank.nested.chain import FILE, NestedChain
from distil_rank.nested.rows import BATCH, StoreRows
from distil_rank.nested.sources import chain_models, raw_store
from distil_rank.proteins.sharding import Shards
from distil_rank.proteins.store import PROVENANCE, SCHEMA, EmbeddingStore, new_shard, shard_path
from distil_rank.proteins.store_index import INDEX, copy_index


@dataclass(frozen=True)
class Config:
    fasta: Annotated[Path, tyro.conf.Positional]  # FASTA of proteins to work on
    chain: Path  # folder written by `nested fit`
    out: Path  # where to write
    dim: int | None = None  # cut the embedding here (default: all of matryoshka_dims)
    normalize: bool = False  # divide by the L2 norm, after the cut
    pool: Literal["mean", "bos", "residues"] = "mean"  # one vector a protein or one a residue
    store_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of stored embeddings
    long: Literal["error", "truncate", "window"] = "error"  # what proteins over max_length become
    max_length: int = 1022  # longest protein in residues
    models: tuple[str, ...] = ()  # models by name, file or folder, smallest first
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    """Write or complete the store `config.out`. InputError before anything is written."""
    chain = NestedChain.load(config.chain)
    if config.pool == "bos":  # another space, and a map that is not its
        required = "--pool mean or residues, what a chain is fitted on, required"
        raise InputError(f"{required}, got bos; embed <cls> with one model")
    loaders = chain_models(chain, config.models, config.dim)
    for loader in loaders.values():
        loader.load()  # that it is the model the chain was fitted on, before any work
    identity = {  # what a store must agree on to be completed
        "chain_sha256": sha256(config.chain / FILE),
        "dim": config.dim or chain.dims[chain.sizes[-1]],
        "normalized": config.normalize,
        "pool": config.pool,
        "dtype": config.store_dtype,
        "long": config.long,
        "max_length": config.max_length,
    }
    if (config.out / PROVENANCE).exists():
        _same(config, identity)
    require_writable(config.out)
    finished = (config.out / INDEX).exists()
    with process_group(config.device) as group:
        raw = config.out / "raw"
        stores = {
            size: raw_store(config.fasta, loader.source, raw / size, config.pool, config)
            for size, loader in loaders.items()
            if not finished
        }
        if stores:
            _fill(config, chain, stores, identity, group)
        if group.rank == 0:
            store = EmbeddingStore(config.out)
            what = f"{len(store)} proteins, {store.rows} x {store.dim} from {', '.join(loaders)}"
            print(f"{config.out}: {what}")


def _same(config: Config, identity: Record) -> None:
    found, remedy = read_json(config.out / PROVENANCE, SCHEMA), "choose another folder"
    shards = Shards(config.fasta, config.pool, config.long, config.max_length, sys.maxsize)
    if found.get("proteins_sha256") != shards.survey(lambda _: None).sha256:
        required = f"the proteins of the store in {config.out} required"
        raise InputError(f"{required}, got others; {remedy}")
    if differing := [key for key, value in identity.items() if found.get(key) != value]:
        required = f"the same {', '.join(differing)} as in {config.out} required"
        raise InputError(f"{required}, got others; {remedy}")


def _fill(
    config: Config,
    chain: NestedChain,
    stores: Mapping[str, StoreRows],
    identity: Record,
    group: Group,
) -> None:
    """Map the raw shards to nested ones, each rank every n-th; then provenance and index."""
    first, *_ = stores.values()
    (layer,) = first.store.provenance["layers"]
    weights = {size: rows.store.provenance["weights_sha256"] for size, rows in stores.items()}
    provenance = {
        **first.store.provenance,
        **identity,
        "model": f"nested {' + '.join(stores)}",
        "weights_sha256": weights,
        "matryoshka_dims": [d for d in chain.dims.values() if d <= identity["dim"]],
        "truncate_dim": identity["dim"],
    }
    if group.rank == 0:
        write_json(config.out / PROVENANCE, provenance)
    sizes, dtype = first.shard_sizes(), getattr(torch, config.store_dtype)
    for shard in range(group.rank, len(sizes), group.world):
        path = shard_path(config.out, shard)
        if path.exists():
            continue
        with new_shard(path, [layer], sizes[shard], identity["dim"], dtype) as write:
            for start in range(0, sizes[shard], BATCH):
                count = min(BATCH, sizes[shard] - start)
                raws = {size: rows.read_shard(shard, start, count) for size, rows in stores.items()}
                write(start, chain.embed(raws, config.dim, config.normalize)[None])
    group.barrier()
    if group.rank == 0:
        copy_index(
            first.store.path, config.out, [shard_path(config.out, i) for i in range(len(sizes))]
        )
        shutil.rmtree(config.out / "raw")
    group.barrier()
