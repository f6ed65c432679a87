"""What written proteins are like: valid, ended, natural in composition, new, of a family."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from distil_rank.core.intervals import percentile_interval, share_interval, t_interval
from distil_rank.core.records import Metric, Record, interval
from distil_rank.proteins.fasta import AMINO_ACIDS

Array = NDArray[np.float64]
BOOTSTRAPS = 1000
SMALL_KL = 0.05  # nats: amino acids as in nature
HMM_OF = 500  # proteins that the HMM is built from
ROUNDS = 3  # of searching the family with the HMM and building it again from what is found
REACH = 1e-3  # largest E-value of a member, for a database of this many proteins:
DATABASE = 10_000


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
    family: Sequence[str] = (),
) -> Writing:
    """All metrics of a set of written proteins."""
    n = len(generated)
    valid = [s for s in generated if s and not set(s) - set(AMINO_ACIDS)]
    found = Writing(
        n=n, validity=share_interval(len(valid), n), ended=share_interval(sum(ended), n)
    )
    if valid:
        found["amino_acid_kl"] = amino_acid_divergence(valid, natural, seed)
        if training:
            rng = np.random.default_rng([seed, 21])
            matched = length_matched([len(s) for s in valid], natural, rng)
            found["novelty"] = novelty(valid, matched, training, seed)
    if family:
        rng = np.random.default_rng([seed, 23])
        matched = length_matched([len(s) for s in generated], natural, rng)
        found["family"] = membership(generated, matched, family, seed)
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


def membership(
    generated: Sequence[str], natural: Sequence[str], family: Sequence[str], seed: int = 0
) -> Record:
    """Share of hits of an HMM of `family` among written, held-out and shuffled proteins."""
    hmm, members = profile(family[:HMM_OF])
    groups = {"generated": generated, "natural": natural, "shuffled": shuffled(natural, seed)}
    found = {name: share_interval(hits(hmm, group), len(group)) for name, group in groups.items()}
    return {**found, "built_from": members, "e_value": REACH, "database": DATABASE}


def profile(family: Sequence[str]) -> tuple[Any, int]:
    """HMM of a family and the number of proteins in it; the search starts from a median one."""
    import pyhmmer

    alphabet = pyhmmer.easel.Alphabet.amino()
    block = digital(family, alphabet)
    order = sorted(range(len(family)), key=lambda i: len(family[i]))
    pipeline = pyhmmer.plan7.Pipeline(alphabet, incE=REACH, seed=42)
    search = pipeline.iterate_seq(block[order[len(order) // 2]], block)
    for result in islice(search, ROUNDS):
        if result.converged:
            break
    return result.hmm, len(result.hits.included)


def hits(hmm: Any, sequences: Sequence[str]) -> int:
    """How many proteins the HMM finds; an empty one is not found."""
    import pyhmmer

    pipeline = pyhmmer.plan7.Pipeline(hmm.alphabet, Z=DATABASE, incE=REACH, E=REACH, seed=42)
    block = digital([sequence for sequence in sequences if sequence], hmm.alphabet)
    return sum(hit.included for hit in pipeline.search_hmm(hmm, block))


def digital(sequences: Sequence[str], alphabet: Any) -> Any:
    """Sequences as HMMER reads them, called by their number."""
    from pyhmmer.easel import DigitalSequenceBlock, TextSequence

    texts = [TextSequence(name=str(i), sequence=s) for i, s in enumerate(sequences)]
    return DigitalSequenceBlock(alphabet, [text.digitize(alphabet) for text in texts])


def shuffled(sequences: Sequence[str], seed: int = 0) -> list[str]:
    """Each sequence with its residues in random order."""
    rng = np.random.default_rng([seed, 22])
    return ["".join(rng.permutation(list(sequence))) for sequence in sequences]


def mean(values: Array) -> Metric:
    """A mean with its Student t interval."""
    return interval(float(values.mean()), *t_interval(values), True, n=len(values))
