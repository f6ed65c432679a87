"""Embed proteins with a nested chain, cut at any dimension: only the models that the dimension needs are run.

    distil-rank nested embed proteins.fasta --chain chain/ --dim 640 --out store/
    distil-rank nested embed proteins.fasta --chain chain/ --pool residues --dtype float16 --out store/
    torchrun --nproc-per-node 4 -m distil_rank nested embed proteins.fasta --chain chain/ --out store/

The result is an embedding store like any other: `EmbeddingStore("store/")["P69905"]`. Its first columns are the embedding
of the smaller models, bit for bit, unless --normalize divides by the L2 norm after the cut. The nested embedding of a mean
is the mean of the nested embeddings, so --pool mean needs no residues. Interrupted? Run the same command again.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from distil_rank.core.devices import Group, process_group
from distil_rank.core.errors import InputError
from distil_rank.nested.chain import FILE, NestedChain
from distil_rank.nested.stores import StoreRows, chain_models
from distil_rank.proteins import embeddings
from distil_rank.proteins.fasta import clean_proteins, read_fasta
from distil_rank.proteins.store import INDEX, PROVENANCE, SCHEMA, EmbeddingStore, ShardWriter, shard_path
from distil_rank.core.records import read_json, require_writable, sha256, write_json

ROWS = 4096  # rows mapped at a time


@dataclass(frozen=True)
class Config:
    fasta: Annotated[Path, tyro.conf.Positional]  # proteins, plain or gzip
    chain: Path  # folder written by `nested fit`
    out: Path  # folder of the store; an unfinished one is completed
    dim: int | None = None  # cut the embedding here; best one of the chain's matryoshka_dims (default: all)
    normalize: bool = False  # divide by the L2 norm, after the cut
    pool: Literal["mean", "bos", "residues"] = "mean"  # one vector per protein (mean, <cls>) or one per residue
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the stored vectors
    long: Literal["error", "truncate", "window"] = "error"  # what to do with proteins longer than max_length
    max_length: int = 1022  # residues in one forward pass
    models: tuple[str, ...] = ()  # a model for each size, where the chain's own names cannot be found


def run(config: Config) -> None:
    """Write or complete the store `config.out`. Raises InputError before anything is written."""
    chain = NestedChain.load(config.chain)
    needed = chain.sizes_for(config.dim)
    loaders = chain_models(chain, config.models)
    if missing := [size for size in needed if size not in loaders]:
        raise InputError(f"models for {', '.join(needed)} required, got none for {', '.join(missing)}; add to --models")
    for size in needed:
        loaders[size].load()  # that each is the model the chain was fitted on, before any work
    done = config.out / PROVENANCE
    if done.exists():
        _same(read_json(done, SCHEMA), config, chain)
    require_writable(config.out)
    finished = (config.out / INDEX).exists()
    with process_group() as group:
        stores = {}
        for size in () if finished else needed:
            folder = config.out / "raw" / size
            folder.parent.mkdir(exist_ok=True)
            options = {"pool": config.pool, "dtype": config.dtype, "long": config.long, "max_length": config.max_length}
            embeddings.run(embeddings.Config(config.fasta, loaders[size].source, folder, **options))  # type: ignore[arg-type]
            stores[size] = StoreRows(folder)
        if stores:
            _fill(config, chain, stores, group)
        if group.rank == 0:
            store = EmbeddingStore(config.out)
            print(f"{config.out}: {len(store)} proteins, {store.rows} x {store.dim} from {', '.join(needed)}")


def _identity(config: Config, chain: NestedChain) -> dict[str, Any]:
    """What a store must agree on to be completed."""
    dim = list(chain.dims.values())[-1] if config.dim is None else config.dim
    own = {"chain_sha256": sha256(config.chain / FILE), "dim": dim, "normalized": config.normalize}
    asked = {"pool": config.pool, "dtype": config.dtype, "long": config.long, "max_length": config.max_length}
    return {**own, **asked}


def _same(found: Mapping[str, Any], config: Config, chain: NestedChain) -> None:
    digest = hashlib.sha256()
    for protein in clean_proteins(read_fasta(config.fasta), lambda _: None):
        digest.update(f"{protein.id}\0{protein.sequence}\n".encode())
    if found.get("proteins_sha256") != digest.hexdigest():
        raise InputError(f"the proteins of the store in {config.out} required, got others; choose another folder")
    differing = [key for key, value in _identity(config, chain).items() if found.get(key) != value]
    if differing:
        raise InputError(
            f"the same {', '.join(differing)} as in {config.out} required, got others; choose another folder"
        )


def _fill(config: Config, chain: NestedChain, stores: Mapping[str, StoreRows], group: Group) -> None:
    """Map the raw shards to nested ones, each rank every n-th; then provenance and index."""
    first = next(iter(stores.values())).store
    identity = _identity(config, chain)
    last = first.provenance["layers"][-1]
    provenance = {
        **first.provenance,
        **identity,
        "model": f"nested {' + '.join(stores)}",
        "weights_sha256": {size: rows.store.provenance["weights_sha256"] for size, rows in stores.items()},
        "layers": [last],
        "matryoshka_dims": [d for d in chain.dims.values() if d <= identity["dim"]],
        "truncate_dim": identity["dim"],
    }
    if group.rank == 0:
        write_json(config.out / PROVENANCE, provenance)
    dtype = getattr(torch, config.dtype)
    sizes = next(iter(stores.values())).shard_sizes()
    for shard in range(group.rank, len(sizes), group.world):
        if shard_path(config.out, shard).exists():
            continue
        writer = ShardWriter(shard_path(config.out, shard), [last], sizes[shard], identity["dim"], dtype)
        for start in range(0, sizes[shard], ROWS):
            count = min(ROWS, sizes[shard] - start)
            raws = {size: rows.read_shard(shard, start, count) for size, rows in stores.items()}
            writer.write(start, chain.embed(raws, config.dim, config.normalize)[None])
        writer.close()
    group.barrier()
    if group.rank == 0:
        temporary = config.out / f"{INDEX}.tmp"
        shutil.copyfile(first.path / INDEX, temporary)
        temporary.replace(config.out / INDEX)  # the same proteins in the same shards
        shutil.rmtree(config.out / "raw")
    group.barrier()
