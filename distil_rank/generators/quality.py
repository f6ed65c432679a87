"""What a set of written proteins is like: valid, ended, natural in composition, new."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from distil_rank.core.intervals import percentile_interval, t_interval
from distil_rank.core.records import Metric, Record, interval
from distil_rank.proteins.fasta import AMINO_ACIDS

Array = NDArray[np.float64]
BOOTSTRAPS = 1000
SMALL_KL = 0.05  # nats: amino acids as in nature


class Writing(TypedDict):
    """Written proteins against held-out natural ones and (a sample of) the training ones."""

    n: int
    validity: Metric
    ended: Metric
    amino_acid_kl: NotRequired[Record]
    novelty: NotRequired[Record]
    family: NotRequired[Record]
    plddt: NotRequired[Record]


def describe(
    generated: Sequence[str],
    ended: Sequence[bool],
    natural: Sequence[str],
    training: Sequence[str],
    seed: int = 0,
) -> Writing:
    """All metrics of a set of written proteins."""
    n = len(generated)
    valid = [s for s in generated if s and not set(s) - set(AMINO_ACIDS)]
    found = Writing(n=n, validity=shares(len(valid), n), ended=shares(sum(ended), n))
    if valid:
        found["amino_acid_kl"] = amino_acid_divergence(valid, natural, seed)
        if training:
            rng = np.random.default_rng([seed, 21])
            matched = length_matched([len(s) for s in valid], natural, rng)
            found["novelty"] = novelty(valid, matched, training, seed)
    return found


def composition(sequences: Sequence[str]) -> Array:
    """Counts of the 20 amino acids per sequence (n, 20)."""
    counts = [[s.count(a) for a in AMINO_ACIDS] for s in sequences]
    return np.array(counts, dtype=float).reshape(-1, 20)


def divergence(counts: Array, reference: Array) -> Array:
    """KL of amino-acid frequencies in nats, half a residue added to each count: (..., 20) both."""
    p = (counts + 0.5) / (counts + 0.5).sum(-1, keepdims=True)
    q = (reference + 0.5) / (reference + 0.5).sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def length_matched(
    lengths: Sequence[int], natural: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """For each length a random natural protein at least so long (else a longest), cut to it."""
    by_length = sorted(natural, key=len)
    starts = np.searchsorted([len(s) for s in by_length], lengths).clip(max=len(by_length) - 1)
    return [by_length[rng.integers(i, len(by_length))][:k] for i, k in zip(starts, lengths)]


def amino_acid_divergence(
    generated: Sequence[str], natural: Sequence[str], seed: int = 0
) -> Record:
    """KL of generated to natural amino-acid frequencies at equal lengths, interval over proteins.

    The plain value is above 0 also for equal frequencies, by about what resampling adds to it: that
    much is taken off. The interval is of the verdict's question, so it holds the value.
    """
    rng = np.random.default_rng([seed, 20])
    lengths = [len(s) for s in generated]
    tenfold = [s for _ in range(10) for s in length_matched(lengths, natural, rng)]
    reference = composition(tenfold).sum(0)
    counts = composition(generated)
    rows = rng.integers(len(counts), size=(BOOTSTRAPS, len(counts)))
    drawn = divergence(np.stack([counts[r].sum(0) for r in rows]), reference)
    plain = float(divergence(counts.sum(0), reference))
    value = max(0.0, 2 * plain - float(drawn.mean()))
    low, high = percentile_interval(2 * plain - drawn)
    low, high = max(0.0, min(low, value)), max(high, value)
    met = {"target": SMALL_KL, "met": value < SMALL_KL, "certain": not low < SMALL_KL <= high}
    return {**interval(value, low, high, False), **met}


def nearest_identity(queries: Sequence[str], targets: Sequence[str]) -> Array:
    """Share of each query's residues that are equal in its best local alignment to a target (n,).

    Smith-Waterman, BLOSUM62, gaps 11/1, against every target.
    """
    from pyopal import Aligner, Database
    from scoring_matrices import ScoringMatrix

    rare = str.maketrans("UO", "XX")  # which BLOSUM62 does not know
    targets = [target.translate(rare) for target in targets]
    aligner = Aligner(ScoringMatrix.from_name("BLOSUM62"), gap_open=11, gap_extend=1)
    database, found = Database(targets), np.zeros(len(queries))
    for i, query in enumerate(query.translate(rare) for query in queries):
        scores = [r.score for r in aligner.align(query, database, algorithm="sw")]
        best = [targets[int(np.argmax(scores))]]
        (full,) = aligner.align(query, Database(best), mode="full", algorithm="sw")
        found[i] = full.alignment.count("M") / len(query)
    return found


def novelty(
    generated: Sequence[str], natural: Sequence[str], training: Sequence[str], seed: int = 0
) -> Record:
    """1 - identity to the nearest training protein, with held-out and shuffled proteins beside."""
    controls = {"natural": natural, "shuffled": shuffled(natural, seed)}
    own = mean(1 - nearest_identity(generated, training))
    found = {name: mean(1 - nearest_identity(s, training)) for name, s in controls.items()}
    return {**own, **found, "nearest_of": len(training)}


def shuffled(sequences: Sequence[str], seed: int = 0) -> list[str]:
    """Each sequence with its residues in random order."""
    rng = np.random.default_rng([seed, 22])
    return ["".join(rng.permutation(list(sequence))) for sequence in sequences]


def shares(hits: int, n: int) -> Metric:
    """A proportion with Wilson's 95 % interval."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(hits, n, method="wilson")
    return interval(hits / n, float(low), float(high), True, n=n)


def mean(values: Array) -> Metric:
    """A mean with its Student t interval."""
    return interval(float(values.mean()), *t_interval(values), True, n=len(values))
