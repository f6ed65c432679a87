"""Embed the proteins of a FASTA with an ESM-2 model into a store.

    distil-rank embed proteins.fasta --model esm2_t33_650M_UR50D --out store/
    distil-rank embed proteins.fasta.gz --model nano-256 --out store/ --split 0.2
    distil-rank embed proteins.fasta --model nano-256 --out store/ --pool residues --long window
    torchrun --nproc-per-node 4 -m distil_rank embed proteins.fasta --model nano-256 --out store/

Interrupted, even killed? Run the same command again: whole shards are kept, missing and damaged
ones are computed, and the store is, byte for byte, what a single run with the same number of
threads writes. Under torchrun each rank computes every n-th shard of the one store, so several
machines need a common file system. One run at a time writes in a store. --verify also compares the
content of finished shards with the checksums in the index, and computes damaged ones again.

A mean is over residues only: never <cls>, <eos> or padding. Proteins longer than --max-length
(ESM-2 was trained on up to 1,022 residues) are an error unless --long says what to do: `truncate`
keeps the first residues, `window` cross-fades overlapping windows (mean and residues over blended
residues, bos the average over windows). --split 0.2 also writes embeddings_{train,val}.pt, the ids
of their rows (.txt) and embeddings.json into the store's folder: no val protein is a near relative
of a train protein. Memory is one batch beside the model, whatever the number of proteins; --split
needs all sequences and vectors at once. Models, letters, reading a store: docs/embedding.md.
"""

import hashlib
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

import torch
import tyro

from distil_rank.core.devices import Group, process_group
from distil_rank.core.errors import InputError, at_least
from distil_rank.core.locks import LOCK, only_writer
from distil_rank.core.records import Record, read_json, require_writable, sha256, write_json
from distil_rank.proteins.checkpoints import Loaded, load_model, locate
from distil_rank.proteins.embedding_files import write_split
from distil_rank.proteins.esm2 import ESM2
from distil_rank.proteins.pooling import embed
from distil_rank.proteins.sharding import Shards, Survey
from distil_rank.proteins.splits import split
from distil_rank.proteins.store import (
    PROVENANCE,
    SCHEMA,
    EmbeddingStore,
    is_whole,
    new_shard,
    shard_path,
)
from distil_rank.proteins.store_index import checksums, counts, insert, new_index

# settings that stand in the provenance under their own names
DECIDING = ("pool", "long", "max_length", "batch_tokens", "shard_residues")


@dataclass(frozen=True)
class Config:
    fasta: Annotated[Path, tyro.conf.Positional]  # FASTA of proteins to work on
    model: str  # a model by name, file or folder
    out: Path  # where to write
    pool: Literal["mean", "bos", "residues"] = "mean"  # one vector a protein or one a residue
    layers: tuple[int, ...] = (-1,)  # indices of layers, 0 = token embedding, -1 = the last
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # arithmetic
    store_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of stored embeddings
    long: Literal["error", "truncate", "window"] = "error"  # what proteins over max_length become
    max_length: int = 1022  # longest protein in residues
    batch_tokens: int = 4096  # tokens in one batch, padding included
    shard_residues: int = 131072  # residues per shard: what an interrupted run may compute again
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one
    split: float | None = None  # also write embeddings_{train,val}.pt, with this share in val
    seed: int = 0  # of everything random
    verify: bool = False  # compare the content of finished shards with their checksums too

    @property
    def shards(self) -> Shards:
        """How the FASTA becomes shards."""
        return Shards(self.fasta, self.pool, self.long, self.max_length, self.shard_residues)


def run(config: Config) -> None:
    """Write or complete the store `config.out`. InputError before anything is written."""
    # On a CPU oneDNN keeps a kernel for each of the last 1,024 shapes (150 MB more after 10,000
    # proteins), though a batch needs a handful. Read when oneDNN is first used; no effect where a
    # program has used it before.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    _check(config)
    with process_group(config.device) as group:
        start, first = perf_counter(), group.rank == 0
        source = config.shards
        survey = source.survey(_warn if first else lambda _: None)
        if first:
            locate(config.model)  # one download for all ranks
        group.barrier()
        loaded = load_model(config.model, group.device, config.dtype)
        provenance = _provenance(config, loaded, survey)
        plan = None
        if first and config.split is not None:  # before the work, because it may be impossible
            sequences = [protein.sequence for shard in source.read() for protein in shard]
            plan = split(sequences, [config.split], config.seed)
        _check_folder(config.out, provenance)
        group.barrier()  # all have looked before anybody writes
        require_writable(config.out)
        with only_writer(config.out) if first else nullcontext():
            if first:
                _open_store(config.out, provenance)
            group.barrier()
            _complete(config, loaded.model, provenance, survey, group)
            if not first:
                return
            took = f"{perf_counter() - start:.1f} s"
            print(f"{config.out}: {survey.proteins} proteins, {survey.residues} residues, {took}")
            if plan is not None:
                drawn = {"fraction": config.split, "seed": config.seed}
                store = EmbeddingStore(config.out)
                train, val = write_split(store, plan, config.fasta.name, drawn)
                parts = " and ".join(f"{len(p)} {n}" for p, n in zip(plan.parts, ("train", "val")))
                print(f"{parts} proteins from {plan.clusters} clusters; now run")
                print(f"  python main.py --train {train} --val {val}")


def _check(config: Config) -> None:
    at_least(8, max_length=config.max_length)
    at_least(1, batch_tokens=config.batch_tokens, shard_residues=config.shard_residues)
    several = config.pool == "residues" or len(config.layers) > 1
    if config.split is not None and (several or not 0 < config.split < 1):
        raise InputError(
            "a split between 0 and 1 of one vector per protein, from one layer, required, got"
            f" split {config.split}, pool {config.pool}, {len(config.layers)} layers"
        )


def _provenance(config: Config, loaded: Loaded, survey: Survey) -> Record:
    """What decides the bytes of the store, and nothing that depends on the machine."""
    layers = loaded.model.depths(config.layers)
    if not layers or len(set(layers)) < len(layers):
        got = f"{config.layers}, which are layers {layers}"
        raise InputError(f"one or more distinct layers required, got {got}")
    return {
        "schema": SCHEMA,
        "model": loaded.name,
        "weights_sha256": loaded.sha256,
        "layers": layers,
        "dim": loaded.model.width,
        "dtype": config.store_dtype,
        "compute": config.dtype,
        **{key: getattr(config, key) for key in DECIDING},
        "longer_proteins": survey.longer,
        "proteins": survey.proteins,
        "residues": survey.residues,
        "rows": sum(survey.shards),
        "shards": len(survey.shards),
        "proteins_sha256": survey.sha256,
    }


def _check_folder(folder: Path, provenance: Record) -> None:
    """InputError unless a store of this provenance is there, unfinished or finished, or nothing."""
    if (folder / PROVENANCE).exists():
        found = read_json(folder / PROVENANCE, SCHEMA)
        differing = [key for key, value in provenance.items() if found.get(key) != value]
        if differing:
            got = ", ".join(f"{k} {provenance[k]} (not {found.get(k)})" for k in differing)
            required = f"the same settings as in {folder} required"
            raise InputError(f"{required}, got {got}; choose another --out")
    elif folder.is_dir() and not all(map(_left_over, folder.iterdir())):
        got = f"{folder} with other files; choose another --out"
        raise InputError(f"a new or empty folder or a store required, got {got}")


def _left_over(path: Path) -> bool:
    """Whether this is a file that a killed run left behind, of no use to anybody."""
    return path.name == LOCK or path.name.startswith(".write-test-") or ".tmp" in path.name


def _open_store(folder: Path, provenance: Record) -> None:
    """Start a store, or go on with the one that is there."""
    _check_folder(folder, provenance)  # again: now nobody else writes
    for path in filter(_left_over, folder.iterdir()):
        if path.name != LOCK:
            path.unlink(missing_ok=True)  # another process tests whether it may write here
    if not (folder / PROVENANCE).exists():
        write_json(folder / PROVENANCE, provenance)


def _complete(
    config: Config, model: ESM2, provenance: Record, survey: Survey, group: Group
) -> None:
    """Compute what is missing or damaged, every n-th shard here, and prove the store whole."""
    dtype = getattr(torch, config.store_dtype)

    def missing() -> list[int]:
        known = checksums(config.out) if config.verify else {}
        paths = [shard_path(config.out, number) for number in range(len(survey.shards))]
        return [
            number
            for number, (path, rows) in enumerate(zip(paths, survey.shards))
            if not is_whole(path, provenance["layers"], rows, model.width, dtype)
            or (number in known and sha256(path) != known[number])
        ]

    needed, indexed = missing(), _index_is_whole(config.out, provenance)
    group.barrier()  # all have looked before anybody writes
    if needed or not indexed:
        if indexed and group.rank == 0:
            _warn(f"{len(needed)} missing or damaged shards of {config.out} are embedded again")
        _fill(config, model, provenance, needed, group)
    if group.rank == 0 and (missing() or not _index_is_whole(config.out, provenance)):
        remedy = "give the ranks one file system, and let nobody else write there"
        raise InputError(f"all shards and proteins in {config.out} required, got fewer; {remedy}")


def _fill(
    config: Config, model: ESM2, provenance: Record, computed: list[int], group: Group
) -> None:
    """Compute those shards and, on the first rank, write the index when all ranks are done."""
    from tqdm import tqdm

    shards = set(computed[group.rank :: group.world])
    source, position = config.shards, count()
    quiet = None if group.rank == 0 else True  # None: a bar on a terminal only
    options = (config.pool, config.layers, config.max_length, config.batch_tokens)
    kind = (model.width, getattr(torch, config.store_dtype))
    with (
        tqdm(total=provenance["residues"], unit="residue", unit_scale=True, disable=quiet) as bar,
        new_index(config.out) if group.rank == 0 else nullcontext() as index,
    ):
        for number, shard in enumerate(source.read()):
            sizes = list(map(source.rows, shard))
            first_rows = [0, *accumulate(sizes)]
            if index is not None:
                for protein, rows, first in zip(shard, sizes, first_rows):
                    digest = hashlib.sha256(protein.sequence.encode()).hexdigest()
                    named = (protein.id, len(protein.sequence), rows, digest)
                    insert(index, "protein", next(position), *named, number, first, protein.header)
            if number in shards:
                sequences = [protein.sequence[: source.seen(protein)] for protein in shard]
                path = shard_path(config.out, number)
                with new_shard(path, provenance["layers"], sum(sizes), *kind) as write:
                    for i, vectors in embed(model, sequences, *options):
                        write(first_rows[i], vectors)
                        bar.update(len(sequences[i]) * group.world)
        group.barrier()
        if index is not None:
            known = checksums(config.out)  # what stays as it was keeps its checksum
            for number in range(provenance["shards"]):
                fresh = number in computed or number not in known
                digest = sha256(shard_path(config.out, number)) if fresh else known[number]
                insert(index, "shard", number, digest)
    group.barrier()


def _index_is_whole(folder: Path, provenance: Record) -> bool:
    """Whether the index holds every protein, every row and every shard."""
    return counts(folder) == tuple(
        provenance[k] for k in ("proteins", "proteins", "rows", "shards")
    )


def _warn(message: str) -> None:
    print(f"distil-rank embed: warning: {message}", file=sys.stderr)
