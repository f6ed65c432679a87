"""Representations over assays: means, and paired comparisons by Wilcoxon with Holm.

Scores of an assay are Spearman by pool, representation and scheme (`probe.score_assay`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distil_rank.core.intervals import mean_interval, share_interval
from distil_rank.core.randomness import generator
from distil_rank.core.records import Metric, Record
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.features import POOLS, Representation, other_regression
from distil_rank.nested.probe import SCHEMES
from distil_rank.proteins.variants import Assay


def over_assays(values: ArrayLike, seed: int) -> Metric:
    """Mean over assays with its 95 % bootstrap interval."""
    x = np.asarray(values, dtype=float)
    return mean_interval(x, generator(seed, "bootstrap", len(x)), higher_is_better=True)


def wilcoxon(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on paired assays; 1 where all are tied."""
    from scipy import stats

    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    return 1.0 if not difference.any() else float(stats.wilcoxon(difference).pvalue)


def paired(ours: Sequence[float], theirs: Sequence[float], seed: int) -> Record:
    """Difference and win rate over assays, in one order of assays. Ties are half a win."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    wins = float((difference > 0).sum() + 0.5 * (difference == 0).sum())
    rate = share_interval(wins, len(difference))
    return {"difference": over_assays(difference, seed), "win_rate": rate}


def compare(
    scores: Mapping[str, Sequence[float]],
    contrasts: Sequence[tuple[str, str]],
    seed: int,
    described: Sequence[tuple[str, str]] = (),
) -> list[Record]:
    """One row per pair (ours, theirs) of scores by assay.

    Tests are of the contrasts alone, and Holm's correction is over them; the other pairs are
    described by the same figures without p.
    """
    from statsmodels.stats.multitest import multipletests

    raw = [wilcoxon(scores[a], scores[b]) for a, b in contrasts]
    holm = multipletests(raw, method="holm")[1]
    pairs = [*contrasts, *described]
    rows: list[Record] = [
        {"ours": a, "theirs": b, **paired(scores[a], scores[b], seed)} for a, b in pairs
    ]
    for row, p, adjusted in zip(rows, raw, holm):
        row |= {"wilcoxon_p": p, "holm_p": float(adjusted)}
    return rows


Pairs = list[tuple[str, str]]


def planned_pairs(chain: NestedChain) -> tuple[Pairs, Pairs]:
    """The contrasts, six over both pools, chosen before any score was seen; pairs to describe.

    Contrasts are of the whole chain with what it must beat at its width: the raw largest model,
    naive PCA of all models, a random completion of the same prefix.
    """
    contrasts, described, own, largest = [], [], chain.kind, chain.sizes[-1]
    other = other_regression(chain.record["options"]["regression"])
    for size in chain.sizes[1:]:
        controls = [f"raw_{size}", f"naive-pca_dim{chain.dims[size]}", f"random-completion_{size}"]
        rest = [f"nested-{other}_{size}"]
        if size == largest:
            contrasts = [(f"{own}_{size}", name) for name in controls]
            controls, rest = [], [*rest, f"raw_{chain.sizes[0]}", "concatenation", "one-hot"]
        described += [(f"{own}_{size}", name) for name in (*controls, *rest)]
    return contrasts, described


def leaderboard(values: Sequence[float], assays: Sequence[Assay]) -> dict[str, float]:
    """Mean by function type, and of these, as ProteinGym ranks models.

    Assays of a protein and a function count once.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for value, assay in zip(values, assays):
        proteins = groups.setdefault(assay.function, {})
        proteins.setdefault(assay.protein or assay.name, []).append(value)
    means = {
        function: float(np.mean([np.mean(found) for found in proteins.values()]))
        for function, proteins in sorted(groups.items())
    }
    return {"mean": float(np.mean(list(means.values()))), **means}


def summary(
    chain: NestedChain,
    compared: Sequence[Representation],
    assays: Sequence[Assay],
    scores: Mapping[str, Record],
    seed: int,
) -> Record:
    """Means over assays of the scores by assay, every planned comparison, ProteinGym's means.

    Random completions count as one representation: the mean of the draws.
    """
    rows = {"one-hot": {"name": "one-hot", "kind": "one-hot", "dim": 0}}
    for r in compared:
        name = r.name.partition("#")[0]
        rows[name] = {"name": name, "kind": r.kind, "dim": r.dim}
    record: Record = {
        "representations": list(rows.values()),
        "assays": [assay.name for assay in assays],
        "schemes": list(SCHEMES),
        "spearman": {pool: {} for pool in POOLS},
        "spearman_by_assay": {pool: {} for pool in POOLS},
        "leaderboard": {pool: {} for pool in POOLS},
    }
    flat = {}
    for pool in POOLS:
        for name in rows:
            cell = _cells(scores, pool, name)
            by_scheme = {"mean": cell.mean(1), **dict(zip(SCHEMES, cell.T))}
            flat[f"{pool}/{name}"] = by_assay = by_scheme["mean"].tolist()
            record["spearman_by_assay"][pool][name] = by_assay
            record["spearman"][pool][name] = {
                scheme: over_assays(column, seed) for scheme, column in by_scheme.items()
            }
            schemes = {s: leaderboard(c, assays)["mean"] for s, c in zip(SCHEMES, cell.T)}
            record["leaderboard"][pool][name] = {**leaderboard(by_assay, assays), **schemes}
    if not any(assay.function for assay in assays):
        del record["leaderboard"]
    contrasts, described = (
        [(f"{p}/{a}", f"{p}/{b}") for p in POOLS for a, b in part] for part in planned_pairs(chain)
    )
    return {**record, "comparisons": compare(flat, contrasts, seed, described)}


def _cells(scores: Mapping[str, Record], pool: str, name: str) -> NDArray[np.float64]:
    """Spearman (assays, schemes) of a representation, or the mean over its random draws."""

    def cell(found: Record, scheme: str) -> float:
        draws = [n for n in found if n.startswith(f"{name}#")] or [name]
        return float(np.mean([found[n][scheme] for n in draws]))

    return np.array([[cell(by_pool[pool], s) for s in SCHEMES] for by_pool in scores.values()])
