"""Embed the proteins of a FASTA with an ESM-2 model into a store.

    distil-rank embed proteins.fasta --model esm2_t33_650M_UR50D --out store/
    distil-rank embed proteins.fasta.gz --model nano-256 --out store/ --split 0.2
    distil-rank embed proteins.fasta --model nano-256 --out residues/ --pool residues --long window
    torchrun --nproc-per-node 4 -m distil_rank embed proteins.fasta --model esm2_t33_650M_UR50D --out store/

Interrupted, even killed? Run the same command again: whole shards are kept, the rest is computed, and the store is,
byte for byte, what a single run with the same number of threads writes. Under torchrun each rank computes every n-th
shard of the one store, so several machines need a common file system.

A mean is over residues only: never <cls>, <eos> or padding. Proteins longer than --max-length (ESM-2 was trained on up
to 1,022 residues) are an error unless --long says what to do: `truncate` keeps the first residues, `window` cross-fades
overlapping windows (mean and residues over blended residues, bos the average over windows). What happens to unusual
letters in sequences is told in distil_rank/proteins/fasta.py. Models: distil_rank/proteins/checkpoints.py.

--split 0.2 also writes embeddings_train.pt, embeddings_val.pt and embeddings.json into the store's folder, where no val
protein is a near relative of a train protein (distil_rank/proteins/splits.py), for `python main.py --train ... --val ...`.
Memory is one batch beside the model, whatever the number of proteins; --split needs all sequences and vectors at once.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
import tyro

from distil_rank.core.devices import Group, process_group
from distil_rank.core.errors import InputError
from distil_rank.proteins.checkpoints import Loaded, load_model, locate
from distil_rank.proteins.esm2 import ESM2
from distil_rank.proteins.fasta import Protein, clean_proteins, read_fasta
from distil_rank.proteins.pooling import embed
from distil_rank.proteins.split_files import Split, plan_split, write_split
from distil_rank.proteins.store import (
    INDEX,
    PROVENANCE,
    SCHEMA,
    EmbeddingStore,
    IndexWriter,
    ShardWriter,
    shard_path,
)
from distil_rank.core.records import read_json, require_writable, write_json


@dataclass(frozen=True)
class Config:
    fasta: Annotated[Path, tyro.conf.Positional]  # proteins, plain or gzip
    model: str  # an ESM-2 name, nano-64|128|256, a .pt file, a Hugging Face folder or hub name
    out: Path  # folder of the store; an unfinished one is completed
    pool: Literal["mean", "bos", "residues"] = "mean"  # one vector per protein (mean, <cls>) or one per residue
    layers: tuple[int, ...] = (-1,)  # layers to keep, 0 = token embedding, -1 = the last
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the stored vectors
    compute: Literal["float32", "bfloat16"] = "float32"  # of the model's matrix products
    long: Literal["error", "truncate", "window"] = "error"  # what to do with proteins longer than max_length
    max_length: int = 1022  # residues in one forward pass
    batch_tokens: int = 4096  # tokens in one batch, padding included
    shard_residues: int = 131072  # residues per shard: what an interrupted run may have to compute again
    split: float | None = None  # also write embeddings_train.pt and embeddings_val.pt, with this share in val
    seed: int = 0  # of the split


def run(config: Config) -> None:
    """Write or complete the store `config.out`. Raises InputError before anything is written."""
    # On a CPU oneDNN keeps a kernel for each of the last 1,024 shapes (150 MB more after 10,000 proteins), though a batch
    # needs a handful. Read when oneDNN is first used; no effect where a program has used it before.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    with process_group() as group:
        start = perf_counter()
        _check(config)
        survey = _survey(config, _warn if group.rank == 0 else _silent)
        if group.rank == 0:
            locate(config.model)  # one download per machine
        group.barrier()
        loaded = load_model(config.model, group.device, config.compute)
        provenance = _provenance(config, loaded, survey)
        plan = _plan_split(config) if config.split is not None and group.rank == 0 else None
        _open_store(config.out, provenance, group)
        if not (config.out / INDEX).is_file():
            _fill(config, loaded.model, provenance, group)
        group.barrier()
        if group.rank == 0:
            took = f"{perf_counter() - start:.1f} s"
            print(f"{config.out}: {survey.proteins} proteins, {survey.residues} residues, {took}")
            if plan is not None and config.split is not None:
                store = EmbeddingStore(config.out)
                train, val = write_split(store, plan, config.fasta.name, config.split, config.seed)
                print(
                    f"{len(plan.train)} train and {len(plan.val)} val proteins from {plan.clusters} clusters; now run"
                )
                print(f"  python main.py --train {train} --val {val}")


@dataclass(frozen=True)
class _Survey:
    """What one pass over the FASTA found."""

    proteins: int
    residues: int  # that the model sees
    shards: int
    longer: int  # proteins longer than max_length
    sha256: str  # of ids and cleaned sequences, in order


def _check(config: Config) -> None:
    if config.max_length < 8:
        raise InputError(f"max_length of at least 8 residues required, got {config.max_length}")
    if config.batch_tokens < 1 or config.shard_residues < 1:
        raise InputError(
            f"positive batch_tokens and shard_residues required, got {config.batch_tokens}, {config.shard_residues}"
        )
    if config.split is not None and (config.pool == "residues" or len(config.layers) > 1 or not 0 < config.split < 1):
        got = f"split {config.split}, pool {config.pool}, {len(config.layers)} layers"
        raise InputError(f"a split between 0 and 1 of one vector per protein, from one layer, required, got {got}")


def _shards(config: Config, warn: Callable[[str], None]) -> Iterator[list[Protein]]:
    """The cleaned proteins in file order, cut where a shard would hold more than `shard_residues` residues."""
    shard: list[Protein] = []
    residues = 0
    for protein in clean_proteins(read_fasta(config.fasta), warn):
        length = _seen(config, protein)
        if shard and residues + length > config.shard_residues:
            yield shard
            shard, residues = [], 0
        shard.append(protein)
        residues += length
    if shard:
        yield shard


def _seen(config: Config, protein: Protein) -> int:
    """Residues of a protein that the model sees."""
    return min(len(protein.sequence), config.max_length) if config.long == "truncate" else len(protein.sequence)


def _survey(config: Config, warn: Callable[[str], None]) -> _Survey:
    """Read everything once, so that bad input ends here and not after an hour."""
    digest = hashlib.sha256()
    proteins = residues = shards = longer = 0
    examples: list[str] = []
    for shard in _shards(config, warn):
        shards += 1
        for protein in shard:
            proteins += 1
            residues += _seen(config, protein)
            digest.update(f"{protein.id}\0{protein.sequence}\n".encode())
            if len(protein.sequence) > config.max_length:
                longer += 1
                if longer <= 5:
                    examples.append(f"{protein.id} ({len(protein.sequence)})")
    if longer:
        found = f"{longer} longer: {', '.join(examples)}{', ...' if longer > 5 else ''}"
        if config.long == "error":
            remedy = "choose --long truncate or --long window"
            raise InputError(f"proteins of at most {config.max_length} residues required, got {found}; {remedy}")
        done = "truncated to" if config.long == "truncate" else "embedded in overlapping windows of"
        warn(f"{done} {config.max_length} residues: {found}")
    return _Survey(proteins, residues, shards, longer, digest.hexdigest())


def _plan_split(config: Config) -> Split:
    """Which proteins go to val; before the embedding, because it may be impossible."""
    return plan_split([p.sequence for shard in _shards(config, _silent) for p in shard], config.split or 0, config.seed)


def _provenance(config: Config, loaded: Loaded, survey: _Survey) -> dict[str, Any]:
    """What decides the bytes of the store, and nothing that depends on the machine."""
    layers = loaded.model.depths(config.layers)
    if not layers or len(set(layers)) < len(layers):
        raise InputError(f"one or more distinct layers required, got {config.layers}, which are layers {layers}")
    return {
        "schema": SCHEMA,
        "model": loaded.name,
        "weights_sha256": loaded.sha256,
        "pool": config.pool,
        "layers": layers,
        "dim": loaded.model.width,
        "dtype": config.dtype,
        "compute": config.compute,
        "long": config.long,
        "max_length": config.max_length,
        "longer_proteins": survey.longer,
        "batch_tokens": config.batch_tokens,
        "shard_residues": config.shard_residues,
        "proteins": survey.proteins,
        "residues": survey.residues,
        "rows": survey.residues if config.pool == "residues" else survey.proteins,
        "shards": survey.shards,
        "proteins_sha256": survey.sha256,
    }


def _open_store(folder: Path, provenance: dict[str, Any], group: Group) -> None:
    """Start a store, or make sure that the one in `folder` is this one, unfinished or finished."""
    if (folder / PROVENANCE).exists():
        found = read_json(folder / PROVENANCE, SCHEMA)
        different = [key for key in provenance if found.get(key) != provenance[key]]
        if different:
            described = ", ".join(f"{key} {provenance[key]} (the store has {found.get(key)})" for key in different)
            raise InputError(f"the same settings as in {folder} required, got {described}; choose another --out")
    elif folder.is_dir() and not all(_left_over(path) for path in folder.iterdir()):
        raise InputError(
            f"a new or empty folder or a store required, got {folder} with other files; choose another --out"
        )
    require_writable(folder)
    group.barrier()
    if group.rank == 0:
        for path in filter(_left_over, folder.iterdir()):
            path.unlink()
        if not (folder / PROVENANCE).exists():
            write_json(folder / PROVENANCE, provenance)
    group.barrier()


def _left_over(path: Path) -> bool:
    """Whether this is an unfinished file (or the probe of `require_writable`) that a killed run left behind."""
    return path.suffix.startswith(".tmp") or path.name.startswith(".write-test-")


def _fill(config: Config, model: ESM2, provenance: dict[str, Any], group: Group) -> None:
    """Compute the shards that are missing (every `world`-th of them here) and, on the first rank, write the index."""
    from tqdm import tqdm

    index = IndexWriter(config.out) if group.rank == 0 else None
    position = 0
    quiet = None if group.rank == 0 else True  # None: a bar on a terminal only
    with tqdm(total=provenance["residues"], unit="residue", unit_scale=True, disable=quiet) as bar:
        for number, shard in enumerate(_shards(config, _silent)):
            sizes = [_seen(config, protein) if config.pool == "residues" else 1 for protein in shard]
            first_rows = [0, *accumulate(sizes)]
            if index is not None:
                for protein, rows, first in zip(shard, sizes, first_rows):
                    sha256 = hashlib.sha256(protein.sequence.encode()).hexdigest()
                    index.add(position, protein.id, len(protein.sequence), rows, sha256, number, first)
                    position += 1
            path = shard_path(config.out, number)
            if number % group.world == group.rank and not path.exists():
                sequences = [protein.sequence[: _seen(config, protein)] for protein in shard]
                writer = ShardWriter(path, provenance["layers"], sum(sizes), model.width, getattr(torch, config.dtype))
                options = (config.pool, config.layers, config.max_length, config.batch_tokens)
                for i, vectors in embed(model, sequences, *options):
                    writer.write(first_rows[i], vectors)
                    bar.update(len(sequences[i]) * group.world)
                writer.close()
    group.barrier()
    if index is not None:
        missing = [number for number in range(provenance["shards"]) if not shard_path(config.out, number).exists()]
        if missing:
            raise InputError(
                f"every shard in {config.out} required, got none for {missing[:5]}; give the ranks one file system"
            )
        index.close()
    group.barrier()


def _warn(message: str) -> None:
    print(f"distil-rank embed: warning: {message}", file=sys.stderr)


def _silent(message: str) -> None:
    """For the second pass over the FASTA, and for other ranks."""
