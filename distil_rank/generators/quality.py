"""What a set of written proteins is like: valid, ended, as long as natural ones, new, diverse."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.core.intervals import percentile_interval, t_interval
from distil_rank.core.records import Metric, Record, interval
from distil_rank.proteins.fasta import AMINO_ACIDS

Array = NDArray[np.float64]
BOOTSTRAPS = 1000
WORD = 4  # residues of the words counted as repeats
RUN = 6  # residues: a run of one residue so long is counted
QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]  # of lengths
ESMFOLD = "facebook/esmfold_v1"


class Lengths(TypedDict):
    quantiles: list[float]
    generated: list[float]
    natural: list[float]
    kolmogorov_smirnov: float


class Writing(TypedDict):
    """Written proteins against held-out natural ones and (a sample of) the training ones."""

    n: int
    natural_frequencies: dict[str, float]  # of amino acids
    frequencies: dict[str, float]
    validity: Metric
    ended: Metric
    lengths: Lengths
    repeated_words: Metric
    repeated_words_natural: Metric
    long_runs: Metric
    amino_acid_kl: NotRequired[Record]
    novelty: NotRequired[Record]
    exact_copies: NotRequired[int]
    diversity: NotRequired[float]
    structure: NotRequired[Record]


def describe(
    generated: Sequence[str],
    ended: Sequence[bool],
    natural: Sequence[str],
    training: Sequence[str],
    seed: int = 0,
) -> Writing:
    """All metrics of a set of written proteins: valid, ended, long, new, diverse, repetitive."""
    from scipy.stats import ks_2samp

    n = len(generated)
    valid = [s for s in generated if s and not set(s) - set(AMINO_ACIDS)]
    lengths, natural_lengths = ([len(s) for s in part] for part in (generated, natural))
    matched = length_matched(lengths, natural, np.random.default_rng([seed, 21]))
    found = Writing(
        n=n,
        natural_frequencies=frequencies(composition(matched)),
        frequencies=frequencies(composition(generated)),
        validity=share(len(valid), n, True),
        ended=share(sum(ended), n, True),
        lengths=Lengths(
            quantiles=QUANTILES,
            generated=np.quantile(lengths, QUANTILES).tolist(),
            natural=np.quantile(natural_lengths, QUANTILES).tolist(),
            kolmogorov_smirnov=float(ks_2samp(lengths, natural_lengths).statistic),
        ),
        repeated_words=mean([repeated(s) for s in generated], False),
        repeated_words_natural=mean([repeated(s) for s in matched], False),
        long_runs=share(sum(longest_run(s) >= RUN for s in generated), n, False),
    )
    if valid:
        found["amino_acid_kl"] = amino_acid_divergence(valid, natural, seed)
        if training:
            nearest = mean(novelty(valid, training), True)
            found["novelty"] = {**nearest, "nearest_of": len(training)}
            found["exact_copies"] = len(set(valid) & set(training))
        found["diversity"] = diversity(valid)
    return found


def composition(sequences: Sequence[str]) -> Array:
    """Counts of the 20 amino acids per sequence (n, 20)."""
    counts = [[s.count(a) for a in AMINO_ACIDS] for s in sequences]
    return np.array(counts, dtype=float).reshape(-1, 20)


def frequencies(counts: Array) -> dict[str, float]:
    """Amino-acid frequencies of all sequences together, from counts (n, 20)."""
    total = counts.sum(0)
    return dict(zip(AMINO_ACIDS, (total / max(total.sum(), 1)).tolist()))


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

    `noise_floor` is the same divergence between two natural samples of these lengths.
    """
    rng = np.random.default_rng([seed, 20])
    lengths = [len(s) for s in generated]
    tenfold = [s for _ in range(10) for s in length_matched(lengths, natural, rng)]
    reference = composition(tenfold).sum(0)
    counts, control = composition(generated), composition(length_matched(lengths, natural, rng))
    rows = rng.integers(len(counts), size=(BOOTSTRAPS, len(counts)))
    drawn = divergence(np.stack([counts[r].sum(0) for r in rows]), reference)
    value = float(divergence(counts.sum(0), reference))
    low, high = percentile_interval(2 * value - drawn)  # basic: resampling adds noise, hence KL
    floor = float(divergence(control.sum(0), reference))
    return {**interval(value, max(0.0, low), high, False), "noise_floor": floor}


def _similarity(a: Sequence[str], b: Sequence[str]) -> NDArray[np.float32]:
    """1 - edit distance / longer length, (a, b)."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    return cdist(a, b, scorer=Levenshtein.normalized_similarity, dtype=np.float32)


def novelty(generated: Sequence[str], training: Sequence[str]) -> NDArray[np.float32]:
    """1 - similarity to the nearest training protein, per protein (n,)."""
    return 1.0 - _similarity(generated, training).max(1)


def diversity(generated: Sequence[str]) -> float:
    """Mean of 1 - similarity over all pairs of generated proteins."""
    if (n := len(generated)) < 2:
        return 0.0
    total = _similarity(generated, generated).sum(dtype=np.float64)
    return float(1 - (total - n) / (n * (n - 1)))


def repeated(sequence: str) -> float:
    """Share of a protein's words of 4 residues that occurred before in it."""
    words = [sequence[i : i + WORD] for i in range(len(sequence) - WORD + 1)]
    return 1 - len(set(words)) / len(words) if words else 0.0


def longest_run(sequence: str) -> int:
    """Length of the longest run of one residue."""
    return max((len(list(run)) for _, run in groupby(sequence)), default=0)


def share(hits: int, n: int, higher_is_better: bool) -> Metric:
    """A proportion with Wilson's 95 % interval."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(hits, n, method="wilson")
    return interval(hits / n, float(low), float(high), higher_is_better, n=n)


def mean(values: Sequence[float] | NDArray[Any], higher_is_better: bool) -> Metric:
    """A mean with its Student t interval."""
    array = np.asarray(values, dtype=float)
    return interval(float(array.mean()), *t_interval(array), higher_is_better, n=len(array))


def fold(sequences: Sequence[str], longest: int = 400) -> Record:
    """pLDDT (0 to 1) of the proteins up to `longest` residues by ESMFold, else why it is skipped.

    Needs the weights in the Hugging Face cache, or the network.
    """
    chosen = [s for s in sequences if 0 < len(s) <= longest]
    if not chosen:
        return {"skipped": f"no generated protein of 1 to {longest} residues"}
    try:
        from transformers import AutoTokenizer, EsmForProteinFolding

        tokenizer = AutoTokenizer.from_pretrained(ESMFOLD)
        model = EsmForProteinFolding.from_pretrained(ESMFOLD).eval()
    except (OSError, ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        return {"skipped": f"ESMFold is not available ({reason})"}
    values = []
    with torch.no_grad():
        for sequence in chosen:
            out = model(**tokenizer([sequence], return_tensors="pt", add_special_tokens=False))
            values.append(float(mean_plddt(out.plddt, out.atom37_atom_exists)[0]))
    return {**mean(values, True), "model": ESMFOLD}


def mean_plddt(plddt: Tensor, atom_exists: Tensor) -> Tensor:
    """Mean pLDDT (b,) over the atoms that exist: plddt and atom_exists (b, l, 37).

    The other atoms of the 37 carry values that mean nothing.
    """
    exists = atom_exists.to(plddt)
    return (plddt * exists).sum((1, 2)) / exists.sum((1, 2)).clamp_min(1)
