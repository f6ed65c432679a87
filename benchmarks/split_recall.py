"""How many held-out proteins have a near relative in training, by a search of its own.

    python -m benchmarks.split_recall   # writes benchmarks/results/split_recall.json; 20 minutes

Proteins of human, yeast and E. coli are drawn, split (a fifth held out) and searched: each held-out
protein against all of training, by MMseqs2 at -s 7.5 and, of the small set, by aligning every pair
(pyswrd). A near relative is what `proteins.splits` calls so; the E value is that of a database of
the training proteins.
"""

import os
import random
import resource
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from distil_rank.core.records import ROOT, Record, environment, sha256, write_json
from distil_rank.proteins.fasta import clean_sequence, read_fasta
from distil_rank.proteins.splits import EVALUE, by_mmseqs, by_swrd, near, split

DATA = Path(os.environ.get("DISTIL_RANK_DATA", ROOT.parent / "shared" / "data")) / "proteins"
SOURCE, COUNTS = "human_yeast_ecoli.fasta.gz", (2019, 20000)


def processor_seconds() -> float:
    """Of this process and those that it waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def with_a_relative(sequences: list[str], train: NDArray, val: NDArray, pairs: bool = False) -> int:
    """How many of `val` have a near relative in `train`; with `pairs` every pair is aligned."""
    places = val.tolist(), train.tolist()
    hits = by_swrd(sequences, *places) if pairs else by_mmseqs(sequences, *places, 7.5, EVALUE)
    return len(np.unique(near(hits)[:, 0]))


def measured(sequences: list[str]) -> Record:
    start, before = perf_counter(), processor_seconds()
    drawn = split(sequences, [0.2])
    took, processor = perf_counter() - start, processor_seconds() - before
    train, val = drawn.parts
    found = with_a_relative(sequences, train, val)
    return {
        "proteins": len(sequences),
        "n_train": len(train),
        "n_val": len(val),
        "clusters": drawn.clusters,
        "val_with_a_relative_in_train": found,
        "share": found / len(val),
        "by_every_pair": with_a_relative(sequences, train, val, True)
        if len(sequences) == COUNTS[0]
        else None,
        "seconds": round(took, 1),
        "processor_seconds": round(processor, 1),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10,
        "method": drawn.method,
    }


def main() -> None:
    every = sorted({clean_sequence(protein.sequence) for protein in read_fasta(DATA / SOURCE)})
    record: Record = {"schema": "split-recall/2", "data": {SOURCE: sha256(DATA / SOURCE)}}
    record |= {"environment": environment(), "splits": []}
    for count in COUNTS:
        sequences = random.Random(0).sample(every, count)
        record["splits"].append(measured(sequences))
        write_json(ROOT / "benchmarks" / "results" / "split_recall.json", record)
    order = np.random.default_rng(0).permutation(COUNTS[0])  # a split without clusters
    cut = COUNTS[0] // 5
    found = with_a_relative(random.Random(0).sample(every, COUNTS[0]), order[cut:], order[:cut])
    record["random"] = {"proteins": COUNTS[0], "n_val": cut, "share": found / cut}
    write_json(ROOT / "benchmarks" / "results" / "split_recall.json", record)


if __name__ == "__main__":
    main()
