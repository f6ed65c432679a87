"""The proteins of a FASTA as they are embedded: in order, cut into shards, long ones treated."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distil_rank.core.errors import InputError, few
from distil_rank.proteins.fasta import Protein, clean_proteins, read_fasta


@dataclass(frozen=True)
class Survey:
    """What one pass over the FASTA found."""

    proteins: int
    residues: int  # that the model sees
    shards: list[int]  # rows of each
    longer: int  # proteins longer than max_length
    sha256: str  # of ids and cleaned sequences, in order


@dataclass(frozen=True)
class Shards:
    """How a FASTA becomes shards: the options of `distil-rank embed` that decide it."""

    fasta: Path
    pool: str
    long: str
    max_length: int
    shard_residues: int

    def seen(self, protein: Protein) -> int:
        """Residues of a protein that the model sees."""
        length = len(protein.sequence)
        return min(length, self.max_length) if self.long == "truncate" else length

    def rows(self, protein: Protein) -> int:
        """Vectors of a protein."""
        return self.seen(protein) if self.pool == "residues" else 1

    def read(self, warn: Callable[[str], None] = lambda _: None) -> Iterator[list[Protein]]:
        """The cleaned proteins in order, cut where a shard would exceed `shard_residues`."""
        shard: list[Protein] = []
        residues = 0
        for protein in clean_proteins(read_fasta(self.fasta), warn):
            length = self.seen(protein)
            if shard and residues + length > self.shard_residues:
                yield shard
                shard, residues = [], 0
            shard.append(protein)
            residues += length
        if shard:
            yield shard

    def survey(self, warn: Callable[[str], None]) -> Survey:
        """Read everything once, so that bad input ends here and not after an hour."""
        digest = hashlib.sha256()
        proteins = residues = 0
        shards, longer = [], []
        for shard in self.read(warn):
            shards.append(sum(map(self.rows, shard)))
            proteins += len(shard)
            for protein in shard:
                residues += self.seen(protein)
                digest.update(f"{protein.id}\0{protein.sequence}\n".encode())
                if len(protein.sequence) > self.max_length:
                    longer.append(f"{protein.id} ({len(protein.sequence)})")
        if longer:
            found = f"{len(longer)} longer: {few(longer)}"
            if self.long == "error":
                required = f"proteins of at most {self.max_length} residues required"
                remedy = "choose --long truncate or --long window"
                raise InputError(f"{required}, got {found}; {remedy}")
            done = "truncated to" if self.long == "truncate" else "embedded in windows of"
            warn(f"{done} {self.max_length} residues: {found}")
        return Survey(proteins, residues, shards, len(longer), digest.hexdigest())
