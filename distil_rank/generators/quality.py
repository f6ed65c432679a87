"""What a set of generated proteins is like: valid, ended, as long as natural ones, new, diverse, not repetitive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distil_rank.proteins.fasta import AMINO_ACIDS
from distil_rank.core.records import interval

Array = NDArray[np.float64]
BOOTSTRAPS = 1000
WORD = 4  # residues of the words counted as repeats


def composition(sequences: Sequence[str]) -> Array:
    """Counts of the 20 amino acids per sequence (n, 20)."""
    return np.array([[s.count(a) for a in AMINO_ACIDS] for s in sequences], dtype=float).reshape(-1, 20)


def frequencies(counts: Array) -> dict[str, float]:
    """Amino-acid frequencies of all sequences together, from counts (n, 20)."""
    total = counts.sum(0)
    return dict(zip(AMINO_ACIDS, (total / max(total.sum(), 1)).tolist(), strict=True))


def divergence(counts: Array, reference: Array) -> Array:
    """KL of amino-acid frequencies in nats, with half a residue added to each count; (..., 20) and (..., 20) ->
    (...)."""
    p = (counts + 0.5) / (counts + 0.5).sum(-1, keepdims=True)
    q = (reference + 0.5) / (reference + 0.5).sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def length_matched(lengths: Sequence[int], natural: Sequence[str], rng: np.random.Generator) -> list[str]:
    """For each length a random natural protein at least so long, cut to it (the longest ones when none is)."""
    by_length = sorted(natural, key=len)
    available = np.array([len(s) for s in by_length])
    starts = np.minimum(np.searchsorted(available, lengths), len(by_length) - 1)
    return [by_length[rng.integers(start, len(by_length))][:k] for start, k in zip(starts, lengths, strict=True)]


def amino_acid_divergence(generated: Sequence[str], natural: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """KL of generated to natural amino-acid frequencies at equal lengths, with a bootstrap interval over proteins.

    `noise_floor` is the same divergence between two natural samples of these lengths.
    """
    rng = np.random.default_rng([seed, 20])
    lengths = [len(s) for s in generated]
    reference = composition([s for _ in range(10) for s in length_matched(lengths, natural, rng)]).sum(0)
    counts, control = composition(generated), composition(length_matched(lengths, natural, rng))
    rows = rng.integers(len(counts), size=(BOOTSTRAPS, len(counts)))
    drawn = divergence(np.stack([counts[r].sum(0) for r in rows]), reference)
    value = float(divergence(counts.sum(0), reference))
    low, high = np.quantile(2 * value - drawn, [0.025, 0.975])  # basic bootstrap: resampling adds noise, hence KL
    return {
        **interval(value, max(0.0, float(low)), float(high), False),
        "noise_floor": float(divergence(control.sum(0), reference)),
    }


def novelty(generated: Sequence[str], training: Sequence[str]) -> Array:
    """1 - similarity to the nearest training protein, per protein (n,); similarity = 1 - edit distance / longer
    length."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    return 1.0 - cdist(generated, training, scorer=Levenshtein.normalized_similarity, dtype=np.float32).max(1)


def diversity(generated: Sequence[str]) -> float:
    """Mean of 1 - similarity over all pairs of generated proteins."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    if len(generated) < 2:
        return 0.0
    similarity = cdist(generated, generated, scorer=Levenshtein.normalized_similarity, dtype=np.float32)
    n = len(generated)
    return float(1 - (similarity.sum(dtype=np.float64) - n) / (n * (n - 1)))


def repeated(sequence: str) -> float:
    """Share of a protein's words of 4 residues that occurred before in it."""
    words = [sequence[i : i + WORD] for i in range(len(sequence) - WORD + 1)]
    return 1 - len(set(words)) / len(words) if words else 0.0


def longest_run(sequence: str) -> int:
    """Length of the longest run of one residue."""
    best = current = 0
    for a, b in zip(" " + sequence, sequence, strict=False):
        current = current + 1 if a == b else 1
        best = max(best, current)
    return best


def share(hits: int, n: int, higher_is_better: bool) -> dict[str, Any]:
    """A proportion with Wilson's 95 % interval."""
    z2, p = 1.96**2, hits / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    return interval(p, max(0.0, centre - half), min(1.0, centre + half), higher_is_better, n=n)


def mean(values: Sequence[float] | Array, higher_is_better: bool) -> dict[str, Any]:
    """A mean with its normal 95 % interval."""
    array = np.asarray(values, dtype=float)
    half = 1.96 * float(array.std(ddof=1)) / len(array) ** 0.5 if len(array) > 1 else 0.0
    centre = float(array.mean())
    return interval(centre, centre - half, centre + half, higher_is_better, n=len(array))


def describe(
    generated: Sequence[str], ended: Sequence[bool], natural: Sequence[str], training: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """All metrics of a set of generated proteins against held-out natural ones and (a sample of) the training ones."""
    from scipy.stats import ks_2samp

    n = len(generated)
    valid = [s for s in generated if s and not set(s) - set(AMINO_ACIDS)]
    lengths = np.array([len(s) for s in generated])
    natural_lengths = np.array([len(s) for s in natural])
    matched = length_matched(lengths.tolist(), natural, np.random.default_rng([seed, 21]))
    found: dict[str, Any] = {
        "n": n,
        "natural_frequencies": frequencies(composition(matched)),
        "frequencies": frequencies(composition(generated)),
        "validity": share(len(valid), n, True),
        "ended": share(sum(ended), n, True),
        "lengths": {
            "quantiles": [0.05, 0.25, 0.5, 0.75, 0.95],
            "generated": np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(),
            "natural": np.quantile(natural_lengths, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(),
            "kolmogorov_smirnov": float(ks_2samp(lengths, natural_lengths).statistic),
        },
        "repeated_words": mean([repeated(s) for s in generated], False),
        "repeated_words_natural": mean([repeated(s) for s in matched], False),
        "long_runs": share(sum(longest_run(s) >= 6 for s in generated), n, False),
    }
    if valid:
        found["amino_acid_kl"] = amino_acid_divergence(valid, natural, seed)
        if training:
            found["novelty"] = mean(novelty(valid, training), True) | {"nearest_of": len(training)}
            found["exact_copies"] = len(set(valid) & set(training))
        found["diversity"] = diversity(valid)
    return found
