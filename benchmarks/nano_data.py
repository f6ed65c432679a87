"""The proteins of the nano models, trained on and held out, rebuilt from the shared data folder.

    python -m benchmarks.nano_data work/  # writes work/train.fasta.gz and work/heldout.fasta.gz

All distinct sequences of the Pfam, Swiss-Prot and DeepLoc files (data/README.md).
`models/nano-heldout.txt` lists the sequences drawn for holding out, by the first 12 digits of the
SHA-256 of their letters: whole Pfam families and whole clusters of proteins that share words. What
is left is trained on. Held out *for results* are those of the list that have no near relative among
the trained proteins (`distil_rank.proteins.splits`), nor among those who have one.
"""

import gzip
import hashlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

import benchmarks
from distil_rank.core.records import ROOT, sha256
from distil_rank.proteins.fasta import Protein, clean_sequence, read_fasta, write_fasta
from distil_rank.proteins.splits import components, near_relatives

DATA = benchmarks.DATA / "proteins"
DEEPLOC = ("deeploc_test_set.fasta", "deeploc_our_val_set.fasta")
FILES = ("pfam_domains.tsv.gz", "human_yeast_ecoli.fasta.gz", *DEEPLOC)
LIST = ROOT / "models" / "nano-heldout.txt"


@dataclass(frozen=True)
class Split:
    train: list[Protein]
    held_out: list[Protein]
    clusters: list[int]  # of the held-out proteins
    dropped: int  # listed, but in a cluster with a trained protein


def name(sequence: str) -> str:
    return hashlib.sha256(sequence.encode()).hexdigest()[:12]


def proteins() -> list[Protein]:
    """Distinct cleaned sequences in file order, called by their digest."""
    found: dict[str, Protein] = {}
    with gzip.open(DATA / FILES[0], "rt") as file:
        for line in list(file)[1:]:
            sequence, family = line.split()
            found.setdefault(
                sequence, Protein(name(sequence), f"{name(sequence)} {family}", sequence)
            )
    for source in FILES[1:]:
        for protein in read_fasta(DATA / source):
            sequence = clean_sequence(protein.sequence)
            found.setdefault(
                sequence, Protein(name(sequence), f"{name(sequence)} {protein.id}", sequence)
            )
    return list(found.values())


def input_hashes() -> dict[str, str]:
    return {source: sha256(DATA / source) for source in FILES}


@cache
def split() -> Split:
    every = proteins()
    listed = set(LIST.read_text().split())
    drawn = np.array([protein.id in listed for protein in every])
    pairs = near_relatives([protein.sequence for protein in every], queries=np.flatnonzero(drawn))
    labels = components(len(every), pairs)
    trained = np.isin(labels, labels[~drawn])
    held_out = np.flatnonzero(~trained)
    return Split(
        train=[every[i] for i in np.flatnonzero(~drawn)],
        held_out=[every[i] for i in held_out],
        clusters=labels[held_out].tolist(),
        dropped=int((drawn & trained).sum()),
    )


def main() -> None:
    folder = Path(sys.argv[1])
    parts = split()
    write_fasta(folder / "train.fasta.gz", parts.train)
    write_fasta(folder / "heldout.fasta.gz", parts.held_out)
    print(
        f"{len(parts.train)} train, {len(parts.held_out)} held out,"
        f" {parts.dropped} dropped as relatives of train"
    )


if __name__ == "__main__":
    main()
