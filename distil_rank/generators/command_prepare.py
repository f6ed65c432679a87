"""Read, split and tokenize proteins once, for every command that trains or measures a generator.

    distil-rank generator prepare proteins.fasta.gz --out shards
    distil-rank generator prepare uniref50.fasta.gz --tokenizer nferruz/ProtGPT2 --context 1024 \\
        --split-by random --held-out .01 --train-size-prop .1 --out shards

`--split-by cluster` never cuts a cluster of relatives; without `--identity` it takes the lowest of
30, 50, 70 and 90 % that fills all parts, so a family of close relatives works. Millions of proteins
take `--split-by random`, or `--held-out-fasta` with proteins that another program clustered.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import tyro

from distil_rank.core.errors import InputError, above, at_least, at_most
from distil_rank.core.records import (
    Record,
    atomic,
    config_record,
    environment,
    read_json,
    require_writable,
    sha256,
    shown_path,
    write_json,
)
from distil_rank.generators import prepared
from distil_rank.generators.data import amino_acid_tokenizer
from distil_rank.generators.models import load_tokenizer
from distil_rank.proteins.fasta import clean_proteins, read_fasta


@dataclass(frozen=True)
class Config:
    fasta: Annotated[Path, tyro.conf.Positional]  # FASTA of proteins to work on
    out: Path  # where to write
    tokenizer: str = "amino-acids"  # amino-acids: one token a residue; or that of a model
    context: int = 512  # longest protein in tokens; residues plus about 2 %
    crop: bool = False  # cut longer proteins instead of leaving them out
    train_size_prop: float = 1.0  # share of the training proteins that is used
    held_out: float = 0.1  # share of the proteins kept aside
    held_out_fasta: Path | None = None  # FASTA to measure on, instead of a share of --fasta
    split_by: str = "cluster"  # cluster, random, or the split.json of an earlier run
    identity: float | None = None  # relatives above it never straddle parts; None: as low as works
    hard_identity: float | None = None  # keep a second test set aside, of clusters at this one
    seed: int = 0  # of everything random


def run(config: Config) -> None:
    levels = {"identity": config.identity, "hard_identity": config.hard_identity}
    above(0, train_size_prop=config.train_size_prop, **levels)
    at_most(1, train_size_prop=config.train_size_prop, **levels)
    at_least(0, held_out=config.held_out)
    at_most(0.49, held_out=config.held_out)  # for validation, and as many for test
    at_least(4, context=config.context)
    clustered = config.split_by == "cluster" and config.held_out > 0 and not config.held_out_fasta
    if not clustered and any(levels.values()):
        raise InputError(
            "--split-by cluster with a share of the proteins held out required for --identity and"
            " --hard-identity, got another split; leave them out"
        )
    require_writable(config.out.parent)
    if config.out.exists():
        raise InputError(f"a new --out required, got {config.out}, which exists; choose another")
    own = config.tokenizer == "amino-acids"
    tokenizer = amino_acid_tokenizer() if own else load_tokenizer(config.tokenizer)
    with atomic(config.out) as folder:
        folder.mkdir()
        record = fill(folder, config, tokenizer)
        write_json(folder / "data.json", record)
    parts = {part: found["proteins"] for part, found in record["parts"].items()}
    counts = ", ".join(f"{n} {part}" for part, n in parts.items() if n or part != "hard")
    long = f"{record['too_long']} too long {'cut' if config.crop else 'left out'}"
    print(f"{config.out}: {counts}; {record['duplicates']} duplicates, {long}")


def fill(folder: Path, config: Config, tokenizer: Any) -> Record:
    """Write the folder's files; returns its record."""
    given = list(clean(config.held_out_fasta)) if config.held_out_fasta else []
    read, made = partial(clean, config.fasta), None
    if given:
        method, digests = "given", list(map(prepared.digest, given))
        part_of = prepared.by_list({"validation": digests[::2], "test": digests[1::2]})
    elif config.split_by not in ("random", "cluster"):
        method, part_of = "listed", prepared.by_list(read_json(config.split_by, prepared.SPLIT))
    elif config.split_by == "random" or config.held_out == 0:
        method, part_of = "random", prepared.by_chance(config.held_out, config.seed)
    else:
        distinct = list(dict.fromkeys(read()))
        wanted = (config.held_out, config.identity, config.seed, config.hard_identity)
        method, (part_of, made) = "cluster", prepared.by_cluster(distinct, *wanted)
    how = (config.context, config.crop, config.train_size_prop, config.seed)
    found = prepared.write(folder, chain(read(), given), part_of, tokenizer, *how)
    if not any(part["proteins"] for part in found["parts"].values()):
        raise InputError(f"proteins up to --context {config.context} required, got none; raise it")
    return {
        "schema": prepared.SCHEMA,
        "config": config_record(config),
        "source": shown_path(config.fasta),
        "sha256": sha256(config.fasta),
        "split": {
            "method": method,
            "identity": made["identity"] if made else None,
            "relatives": made,
            "held_out": config.held_out,
        },
        **found,
        "seeds": [config.seed],
        "environment": environment(),
    }


def clean(path: Path) -> Iterator[str]:
    """Cleaned sequences of a FASTA file, streaming."""

    def note(line: str) -> None:
        print(f"note: {line}", file=sys.stderr)

    return (protein.sequence for protein in clean_proteins(read_fasta(path), note))
