"""How many held-out proteins have a near relative in training, by a search of its own.

    python -m benchmarks.split_recall          # writes benchmarks/results/split_recall.json
    python -m benchmarks.split_recall --pairs  # its part `every_pair` again, minutes


Proteins of human, yeast and E. coli are drawn, split (a fifth held out) and searched: each held-out
protein against all of training, by MMseqs2 at -s 7.5. A near relative is what `proteins.splits`
calls so; the E value is that of a database of the training proteins. `every_pair` aligns all pairs
of the small set (pyswrd), low complexity not masked, for the split and for one at random.
"""

import random
import resource
import sys
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

import benchmarks
from distil_rank.core.records import ROOT, Record, environment, read_json, sha256, write_json
from distil_rank.core.tables import markdown
from distil_rank.proteins.fasta import clean_sequence, read_fasta
from distil_rank.proteins.splits import EVALUE, by_mmseqs, by_swrd, near, split

DATA = benchmarks.DATA / "proteins"
RESULT, SCHEMA = ROOT / "benchmarks" / "results" / "split_recall.json", "split-recall/2"
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
        "seconds": round(took, 1),
        "processor_seconds": round(processor, 1),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10,
        "method": drawn.method,
    }


def at_random(count: int) -> tuple[NDArray, NDArray]:
    """Training and held-out positions of a split without clusters."""
    order = np.random.default_rng(0).permutation(count)
    return order[count // 5 :], order[: count // 5]


def by_every_pair(sequences: list[str]) -> Record:
    """Held-out proteins with a near relative in training: of the split, and of one at random."""
    train, test = split(sequences, [0.2]).parts
    parts = {"split": (train, test), "random": at_random(len(sequences))}
    found = {name: with_a_relative(sequences, *part, pairs=True) for name, part in parts.items()}
    shares = {name: found[name] / len(part[1]) for name, part in parts.items()}
    return {"proteins": len(sequences), "share": shares, "environment": environment()}


def main(only_pairs: bool) -> None:
    every = sorted({clean_sequence(protein.sequence) for protein in read_fasta(DATA / SOURCE)})
    small, large = (random.Random(0).sample(every, count) for count in COUNTS)
    record: Record = {"schema": SCHEMA, "data": {SOURCE: sha256(DATA / SOURCE)}}
    if only_pairs:
        record = read_json(RESULT, SCHEMA)
    else:
        record |= {"environment": environment(), "splits": []}
        for sequences in (small, large):
            record["splits"].append(measured(sequences))
            write_json(RESULT, record)
        train, val = at_random(len(small))
        share = with_a_relative(small, train, val) / len(val)
        record["random"] = {"proteins": len(small), "n_val": len(val), "share": share}
    write_json(RESULT, record | {"every_pair": by_every_pair(small)})


def table(record: Record) -> str:
    """Held-out proteins with a near relative in training, by a search independent of the split."""
    pairs = record["every_pair"]
    head = ["proteins", "clusters", "held out", "with a near relative in training", "share"]
    more = ["by aligning every pair*", "seconds of the split", "processor seconds", "peak memory"]
    rows = [[*head, *more]]
    for found in record["splits"]:
        counts = [
            found[k] for k in ("proteins", "clusters", "n_val", "val_with_a_relative_in_train")
        ]
        rows.append([*(f"{n:,}" for n in counts), f"{found['share']:.2%}"])
        alike = found["proteins"] == pairs["proteins"]
        rows[-1].append(f"{pairs['share']['split']:.2%}" if alike else "")
        rows[-1] += [f"{found[k]:,.0f}" for k in ("seconds", "processor_seconds")]
        rows[-1].append(f"{found['peak_megabytes']:,} MB")
    drawn = record["random"]
    rows.append([f"{drawn['proteins']:,}, drawn at random", "", f"{drawn['n_val']:,}", ""])
    rows[-1] += [f"{drawn['share']:.2%}", f"{pairs['share']['random']:.2%}", "", "", ""]
    return markdown(rows)


if __name__ == "__main__":
    main("--pairs" in sys.argv[1:])
