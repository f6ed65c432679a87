"""How many near relatives the clusters of `proteins.splits` keep together, by brute force.

    python -m benchmarks.split_recall   # writes benchmarks/results/split_recall.json; 10 minutes

Real pairs: every pair among 800 domains of 40 Pfam families and among 500 proteins of the DeepLoc
sets is aligned (the definition of a near relative), and compared with the clusters: by words of the
length that suits so few proteins, by words of 7 as in large sets, and by MMseqs2 where it is
installed. Planted pairs: random proteins of 270 residues and mutants with uniform substitutions and
two insertions and deletions, which is harder than what evolution does.
"""

import gzip
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

from distil_rank.core.records import ROOT, write_json
from distil_rank.proteins import splits
from distil_rank.proteins.fasta import AMINO_ACIDS, clean_sequence, read_fasta
from distil_rank.proteins.splits import aligned_identity, cluster

DATA = Path(os.environ.get("DISTIL_RANK_DATA", ROOT.parent / "shared" / "data")) / "proteins"
BINS = (0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.01)


def pfam_sample(rng: random.Random) -> list[str]:
    families: dict[str, list[str]] = {}
    with gzip.open(DATA / "pfam_domains.tsv.gz", "rt") as file:
        for line in list(file)[1:]:
            sequence, family = line.split()
            families.setdefault(family, []).append(sequence)
    large = sorted(family for family, members in families.items() if len(members) >= 20)
    return [
        sequence
        for family in rng.sample(large, 40)
        for sequence in rng.sample(families[family], 20)
    ]


def deeploc_sample(rng: random.Random) -> list[str]:
    names = ("deeploc_test_set.fasta", "deeploc_our_val_set.fasta")
    sequences = sorted(
        {clean_sequence(p.sequence) for name in names for p in read_fasta(DATA / name)}
    )
    return rng.sample([sequence for sequence in sequences if len(sequence) <= 600], 500)


def near_relatives(sequences: Sequence[str]) -> dict[tuple[int, int], float]:
    """Identity of every related pair, by aligning all of them."""
    pairs = combinations(range(len(sequences)), 2)
    identities = {(i, j): aligned_identity(sequences[i], sequences[j]) for i, j in pairs}
    return {pair: identity for pair, identity in identities.items() if identity >= 0.3}


@contextmanager
def long_words() -> Iterator[None]:
    """Words of 7 letters, as for sets of more than three million residues."""
    limits = dict(splits._LONGEST)
    splits._LONGEST.clear()
    try:
        yield
    finally:
        splits._LONGEST.update(limits)


def methods() -> Iterator[tuple[str, str]]:
    """Name in the record and `candidates` of each method."""
    yield "words", "words"
    with long_words():
        yield "words of 7", "words"
    if shutil.which("mmseqs"):
        yield "mmseqs", "mmseqs"


def real(
    sequences: Sequence[str], identities: dict[tuple[int, int], float], candidates: str
) -> dict:
    labels = cluster(sequences, candidates=candidates)
    together = {(i, j): bool(labels[i] == labels[j]) for i, j in identities}
    by_identity = []
    for low, high in pairwise(BINS):
        inside = [together[pair] for pair, identity in identities.items() if low <= identity < high]
        by_identity.append(
            {"from": low, "to": min(high, 1), "pairs": len(inside), "together": sum(inside)}
        )
    return {
        "together": sum(together.values()),
        "proteins_with_a_relative_elsewhere": len(
            {i for pair, joined in together.items() if not joined for i in pair}
        ),
        "by_identity": by_identity,
        "largest_cluster": int(np.bincount(labels).max()),
    }


def planted(identity: float, candidates: str, pairs: int = 300) -> dict:
    rng = random.Random(f"planted {identity}")
    parents = ["".join(rng.choices(AMINO_ACIDS, k=270)) for _ in range(pairs)]
    mutants = []
    for parent in parents:
        letters = list(parent)
        for i in rng.sample(range(270), round((1 - identity) * 270)):
            letters[i] = rng.choice(AMINO_ACIDS.replace(letters[i], ""))
        for _ in range(2):
            at = rng.randrange(len(letters))
            letters[at:at] = rng.choices(AMINO_ACIDS, k=rng.randint(1, 3))
            at = rng.randrange(len(letters) - 3)
            del letters[at : at + rng.randint(1, 3)]
        mutants.append("".join(letters))
    labels = cluster([*parents, *mutants], candidates=candidates)
    related = np.array([aligned_identity(a, b) >= 0.3 for a, b in zip(parents, mutants)])
    together = labels[:pairs] == labels[pairs:]
    return {
        "identity": identity,
        "pairs": pairs,
        "near_relatives": int(related.sum()),
        "near_relatives_together": int((related & together).sum()),
    }


def main() -> None:
    rng = random.Random(0)
    record: dict = {"schema": "split-recall/1", "samples": {}, "planted_mutants": {}}
    for name, sequences in (("pfam", pfam_sample(rng)), ("deeploc", deeploc_sample(rng))):
        identities = near_relatives(sequences)
        found = {
            method: real(sequences, identities, candidates) for method, candidates in methods()
        }
        record["samples"][name] = {
            "proteins": len(sequences),
            "related_pairs": len(identities),
            **found,
        }
        print(name, json.dumps(record["samples"][name], indent=1), flush=True)
    for method, candidates in methods():
        rows = [planted(identity, candidates) for identity in (0.3, 0.4, 0.5, 0.6, 0.7, 0.9)]
        record["planted_mutants"][method] = rows
        print(method, rows, flush=True)
    write_json(ROOT / "benchmarks" / "results" / "split_recall.json", record)


if __name__ == "__main__":
    main()
