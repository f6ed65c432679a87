"""Clusters of related sequences, and splits that never cut one: no relatives across the parts.

Two proteins are *near relatives* if their best local alignment (Smith-Waterman, BLOSUM62, 11/1)

* has at least `identity` equal residues per alignment column,
* spans at least half of the shorter sequence, and
* scores at least 60 (28 bits), or half of what the shorter sequence scores against itself if that
  is less; below, alignments arise by chance.

Clusters are the connected components of that relation (single linkage), so two related proteins
*that were compared* are always together. Which pairs are compared:

* MMseqs2's sensitive all-against-all search (`mmseqs search -s 7.5`) where `mmseqs` is installed;
* otherwise pairs that share two similar words on one diagonal: words of 5 to 7 letters under four
  spaced patterns, in a 12-letter alphabet that merges L/M, I/V, K/R, E/Q, A/S/T, N/D and F/Y. The
  more residues, the longer the words, so that time stays in minutes (50,000 proteins) and memory
  bounded, and the more distant relatives are missed: how many is measured by
  `python -m benchmarks.split_recall`. Install MMseqs2 where that matters.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator
from distil_rank.proteins.fasta import Protein, write_fasta

_CLASSES = ("LM", "IV", "KR", "EQ", "AST", "ND", "FY", "C", "G", "H", "P", "W")
# which of the letters at these offsets make the word; shorter words are the beginnings of these
_PATTERNS = ("1101100111", "111010010011", "1100101000101011", "11010001011011")
_LONGEST = {
    5: 300_000,
    6: 3_000_000,
}  # residues up to which words of 5 and 6 letters are rare enough; beyond, 7
_HIT_WINDOW = 8  # residues by which the diagonals of two words may differ (small gaps)
_BUCKET = 400  # later occurrences of itself with which a word is paired, at most (repeats)
# chance alone gives long pairs more shared words, so they need one more per so many residues
_RESIDUES_PER_HIT = 300
_HITS_AT_ONCE = 40_000_000  # memory: 8 bytes each, a few times


def cluster(
    sequences: Sequence[str], identity: float = 0.3, candidates: str = "auto"
) -> NDArray[np.int64]:
    """Cluster label per sequence (n,), shared by near relatives, from 0 in order of appearance.

    candidates: "mmseqs", "words", or "auto" (MMseqs2 when installed). Equal sequences always share
    a label.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not 0 < identity <= 1:
        raise InputError(f"required an identity in (0, 1], got {identity}; 0.3 is the usual one")
    if candidates == "auto":
        candidates = "mmseqs" if shutil.which("mmseqs") else "words"
    number = {sequence: i for i, sequence in enumerate(dict.fromkeys(sequences))}
    distinct = list(number)
    labels = np.arange(len(distinct))
    linked = np.empty((0, 2), dtype=np.int64)
    for batch in _by_search(distinct) if candidates == "mmseqs" else _by_words(distinct):
        for part in np.array_split(batch, max(1, len(batch) // 5000)):
            part = part[labels[part[:, 0]] != labels[part[:, 1]]]  # the others are joined already
            keep = np.array(
                [related(distinct[i], distinct[j], identity) for i, j in part.tolist()], dtype=bool
            )
            linked = np.concatenate([linked, part[keep]])
            graph = coo_array(
                (np.ones(len(linked)), (linked[:, 0], linked[:, 1])),
                shape=(len(distinct), len(distinct)),
            )
            labels = connected_components(graph, directed=False)[1]
    _, first, rank = np.unique(labels, return_index=True, return_inverse=True)
    labels = np.argsort(np.argsort(first))[rank]
    return labels[np.array([number[sequence] for sequence in sequences], dtype=np.int64)]


def related(a: str, b: str, identity: float = 0.3) -> bool:
    """Whether two cleaned sequences are near relatives, as defined above."""
    return aligned_identity(a, b) >= identity


def aligned_identity(a: str, b: str) -> float:
    """Equal residues per column of the best local alignment; 0 where it is too weak or short."""
    import parasail

    if not a or not b or a == b:
        return float(a == b)
    if len(a) > len(b):
        a, b = b, a
    blosum = parasail.blosum62
    least = min(60.0, sum(map(_self_scores().__getitem__, a[:40])) / 2)
    if parasail.sw_striped_sat(a, b, 11, 1, blosum).score < least:
        return 0.0
    best = parasail.sw_stats_striped_sat(a, b, 11, 1, blosum)
    return best.matches / best.length if 2 * best.length >= len(a) else 0.0


@cache
def _self_scores() -> dict[str, int]:
    """What a letter scores against itself; the package's own table is slow to index."""
    import parasail

    table = parasail.blosum62.matrix.copy()
    return {
        chr(code): int(table[row, row])
        for code, row in enumerate(parasail.blosum62.mapper)
        if code < 128
    }


def split(
    labels: NDArray[np.int64], fractions: Sequence[float], seed: int = 0
) -> list[NDArray[np.int64]]:
    """Sorted index arrays: split(labels, [0.1, 0.1]) gives train, val, test.

    Whole clusters are drawn in random order (the same for the same labels and seed) into the last
    part, then the one before, each up to its share of the proteins; a cluster that does not fit
    goes on to the next, at last to the first. So a part may be smaller than asked for when clusters
    are large; an empty one raises InputError.
    """
    if not fractions or min(fractions) <= 0 or sum(fractions) >= 1:
        raise InputError(
            f"required fractions above 0, with a sum below 1, got {list(fractions)}; 0.2 is usual"
        )
    import torch

    sizes = np.bincount(labels)
    order = torch.randperm(len(sizes), generator=generator(seed, "split")).numpy()
    part_of = np.zeros(len(sizes), dtype=np.int64)
    for part in range(len(fractions), 0, -1):
        room = round(fractions[part - 1] * len(labels))
        for name in order[part_of[order] == 0]:
            if sizes[name] <= room:
                part_of[name] = part
                room -= sizes[name]
    parts = [np.flatnonzero(part_of[labels] == part) for part in range(len(fractions) + 1)]
    if not all(map(len, parts)):
        raise InputError(
            f"required a protein in every part, got parts of {[len(part) for part in parts]}"
            f" from {len(sizes)} clusters of up to {sizes.max(initial=0)} proteins;"
            " give more, or more diverse, proteins"
        )
    return parts


def _by_words(sequences: Sequence[str]) -> Iterator[NDArray[np.int64]]:
    """Candidate pairs (m, 2) with two words on one diagonal, those with most words first."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.repeat(np.arange(len(sequences)), lengths)
    tables = [
        _word_table("".join(sequences), starts, pattern) for pattern in _patterns(int(starts[-1]))
    ]
    hits = np.zeros(
        len(sequences), dtype=np.int64
    )  # pairs of words to come, by the sequence of the first
    for words, positions in tables:
        later = np.searchsorted(words, words, side="right") - np.arange(len(words)) - 1
        hits += np.bincount(
            owner[positions], np.minimum(later, _BUCKET), minlength=len(sequences)
        ).astype(np.int64)
    batch_of = np.cumsum(hits) // _HITS_AT_ONCE
    for low, high in zip(
        *(np.searchsorted(batch_of, np.unique(batch_of), side=side) for side in ("left", "right"))
    ):
        keys = np.concatenate([_word_pairs(table, starts, owner, low, high) for table in tables])
        keys.sort()
        same = (keys[1:] >> 20 == keys[:-1] >> 20) & (keys[1:] - keys[:-1] <= _HIT_WINDOW)
        pairs, count = np.unique(keys[1:][same] >> 20, return_counts=True)
        pairs = np.stack([pairs // len(sequences), pairs % len(sequences)], axis=1)[
            np.argsort(-count, kind="stable")
        ]
        expected = lengths[pairs].min(axis=1) // _RESIDUES_PER_HIT
        yield pairs[np.sort(count)[::-1] > expected]


def _patterns(residues: int) -> list[str]:
    weight = next((letters for letters, most in _LONGEST.items() if residues <= most), 7)
    ends = [
        [i for i, mark in enumerate(pattern) if mark == "1"][weight - 1] + 1
        for pattern in _PATTERNS
    ]
    return [pattern[:end] for pattern, end in zip(_PATTERNS, ends)]


def _word_table(
    letters: str, starts: NDArray[np.int64], pattern: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted words and positions, not of other letters, of one or two classes, across ends."""
    code = np.full(256, -1, dtype=np.int64)
    for number, members in enumerate(_CLASSES):
        code[[ord(letter) for letter in members]] = number
    classes = code[np.frombuffer(letters.encode(), dtype=np.uint8)]
    count = max(0, len(classes) - len(pattern) + 1)
    word, seen, valid = (
        np.zeros(count, dtype=np.int64),
        np.zeros(count, dtype=np.int64),
        np.ones(count, dtype=bool),
    )
    for offset in (i for i, mark in enumerate(pattern) if mark == "1"):
        here = classes[offset : offset + count]
        word = word * len(_CLASSES) + here
        seen |= 1 << np.maximum(here, 0)
        valid &= here >= 0
    valid &= np.bitwise_count(seen) >= 3
    for back in range(1, len(pattern)):
        cut = starts[1:-1] - back
        valid[cut[(cut >= 0) & (cut < count)]] = False
    key = np.sort((word[valid] << 36) | np.flatnonzero(valid))
    return key >> 36, key & ((1 << 36) - 1)


def _word_pairs(
    table: tuple[NDArray, NDArray],
    starts: NDArray[np.int64],
    owner: NDArray[np.int64],
    low: int,
    high: int,
) -> NDArray[np.int64]:
    """(sequence, other, diagonal) in one integer per pair of equal words, first in [low, high)."""
    words, positions = table
    n = len(starts) - 1
    alive = np.flatnonzero((positions >= starts[low]) & (positions < starts[high]))
    found = [np.empty(0, dtype=np.int64)]
    for step in range(1, _BUCKET + 1):
        alive = alive[alive + step < len(words)]
        alive = alive[words[alive] == words[alive + step]]
        if not len(alive):
            break
        a, b = positions[alive], positions[alive + step]
        i, j = owner[a], owner[b]
        diagonal = (b - starts[j]) - (a - starts[i]) + (1 << 19)
        found.append(((i * n + j) << 20 | diagonal)[i != j])
    return np.concatenate(found)


def _by_search(sequences: Sequence[str]) -> Iterator[NDArray[np.int64]]:
    """Candidate pairs (m, 2) from MMseqs2's all-against-all search."""
    with tempfile.TemporaryDirectory() as folder:
        fasta, hits = Path(folder, "all.fasta"), Path(folder, "hits.tsv")
        write_fasta(
            fasta, (Protein(str(i), str(i), sequence) for i, sequence in enumerate(sequences))
        )
        files = [str(fasta), str(fasta), str(hits), str(Path(folder, "work"))]
        command = ["mmseqs", "easy-search", *files, "-s", "7.5", "-e", "10"]
        done = subprocess.run(
            [*command, "--format-output", "query,target"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            got = f"exit status {done.returncode}: {done.stderr[-300:]}"
            raise InputError(f"required a working MMseqs2, got {got}")
        pairs = np.loadtxt(hits, dtype=np.int64, ndmin=2)
    yield pairs[pairs[:, 0] < pairs[:, 1]]
