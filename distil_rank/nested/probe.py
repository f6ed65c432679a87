"""The probe: ProteinGym's three fold rules, ridge by nested cross-validation, Spearman.

Folds are those of the official file, else by its rules (Notin et al. 2023, ProteinNPT), from the
rank of a mutant's position among the mutated ones:

* random;
* modulo: rank mod 5, so that every position is new but has neighbors in training;
* contiguous: five stretches of positions, so that whole regions are new.

As there, Spearman is over the out-of-fold predictions of all folds, and both sides are in units of
the training folds: a training mean is low where its fold is high, so that pooling raw units makes
even noise rank the folds, in reverse.

Ridge takes a whole penalty path, exactly. With centered features X = Z - mean Z and an unpenalized
intercept, the predictions of a fit on the rows T are

    mean y_T + (z - mean z_T) (X_T^T X_T + penalty I)^-1 X_T^T (y_T - mean y_T)
  = mean y_T + (z - mean z_T) X_T^T (X_T X_T^T + penalty I)^-1 (y_T - mean y_T)

and, by Cholesky, the second is solved where there are more features than half of all rows, else the
first. Leaving out the folds a and b gives the error of b for the outer fold a and that of a for the
outer fold b: k folds need k (k + 1) / 2 training sets, and the second form takes all of them from
one matrix of inner products.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.linalg.lapack import dposv
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.moments import symmetric_product
from distil_rank.core.randomness import generator
from distil_rank.nested.features import Representation
from distil_rank.proteins.fasta import AMINO_ACIDS
from distil_rank.proteins.variants import Assay

FOLDS = 5
SCHEMES = ("random", "modulo", "contiguous")
PENALTIES = torch.logspace(
    -8, 2, 21, dtype=torch.float64
)  # of the centered rows' mean squared norm
Scores = dict[str, dict[str, dict[str, float]]]  # Spearman by pool, representation and scheme


def folds(positions: Sequence[Sequence[int]], scheme: str, seed: int = 0) -> Tensor:
    """Fold number 0 ... 4 of each mutant (n,); a multiple mutant goes with its first position.

    Contiguous stretches hold about equally many mutated positions.
    """
    n = len(positions)
    first = torch.tensor([p[0] for p in positions])
    if scheme == "random":
        fold = torch.empty(n, dtype=torch.long)
        fold[torch.randperm(n, generator=generator(seed, "folds", n))] = torch.arange(n) % FOLDS
        return fold
    sites, rank = first.unique(return_inverse=True)
    if scheme == "modulo":
        return rank % FOLDS
    if scheme == "contiguous":
        return rank * FOLDS // len(sites)
    raise InputError(f"one of the schemes {', '.join(SCHEMES)} required, got {scheme!r}")


def one_hot(assay: Assay) -> Tensor:
    """Indicators (n, 20 x positions that vary) of the residue at every mutated position."""
    sites = sorted({p for changed in assay.positions for p in changed})
    letters = torch.tensor([[ord(s[p]) for p in sites] for s in assay.sequences])
    alphabet = torch.tensor([ord(c) for c in sorted(AMINO_ACIDS)])
    return (letters[:, :, None] == alphabet).double().flatten(1)


def spearman(prediction: ArrayLike, score: ArrayLike) -> float:
    """Spearman correlation; 0 where a constant prediction ranks nothing."""
    from scipy import stats

    if np.ptp(prediction) == 0 or np.ptp(score) == 0:
        return 0.0
    return float(stats.spearmanr(prediction, score).statistic)


def standardized(values: Tensor, scores: Tensor, fold: Tensor) -> Tensor:
    """Values (n,) of each fold less the mean of all other scores (n,), over their deviation."""
    result = torch.empty_like(scores)
    for number in fold.unique():
        rest = scores[fold != number]
        deviation = rest.std(correction=0)
        result[fold == number] = (values[fold == number] - rest.mean()) / (deviation or 1)
    return result


def score_features(features: Tensor, assay: Assay, seed: int = 0) -> dict[str, float]:
    """Spearman by scheme of ridge on features (n, d) of the mutants."""
    path, found = RidgePath(features), {}
    for scheme in SCHEMES:
        fold = assay.folds.get(scheme)
        fold = folds(assay.positions, scheme, seed) if fold is None else fold
        sides = path.nested(assay.scores, fold)[0], assay.scores
        units = (standardized(side, assay.scores, fold).numpy() for side in sides)
        found[scheme] = spearman(*units)
    return found


def score_assay(
    assay: Assay,
    raws: Mapping[str, Mapping[str, Tensor]],
    compared: Sequence[Representation],
    seed: int,
) -> Scores:
    """Scores of every representation, and of one-hot, for raw embeddings by pool and size."""
    scores: Scores = {pool: {} for pool in raws}
    control = score_features(one_hot(assay), assay, seed)
    for pool, by_size in raws.items():
        scores[pool]["one-hot"] = control
        for r in compared:
            scores[pool][r.name] = score_features(r.features(by_size), assay, seed)
    return scores


class RidgePath:
    """Ridge on features (n, d), for the whole path of penalties."""

    def __init__(self, features: Tensor):
        if features.ndim != 2 or len(features) < 3 or not bool(features.isfinite().all()):
            got = tuple(features.shape)
            raise InputError(f"finite features (n >= 3, d) required, got shape {got}")
        x = features.double()
        self._x = x - x.mean(0)
        spread = float(self._x.square().sum()) / len(x)
        # constant features: only the intercept is fitted
        self.penalties = PENALTIES * (spread if spread > 0 else 1)
        n, d = x.shape
        self._products = symmetric_product(self._x, self._x.T) if 2 * d > n else None

    def leave_out(self, y: Tensor, rows: Tensor) -> Tensor:
        """Predictions (penalties, |rows|, c) at `rows` of the fits on all other rows; y (n, c)."""
        rest = torch.ones(len(self._x), dtype=torch.bool)
        rest[rows] = False
        return self._fits(y.double(), torch.nonzero(rest)[:, 0], rows)

    def nested(self, y: Tensor, folds: Tensor) -> tuple[Tensor, Tensor]:
        """Out-of-fold predictions of y (n,) and each outer fold's penalty, by fold numbers (n,).

        The penalty of an outer fold has the least squared error over the other folds as inner
        folds, without the outer fold's rows; then the fit on all other folds predicts it.
        """
        target = y.double()[:, None]
        numbers = folds.unique()
        if len(numbers) < 3:
            got = f"{len(numbers)}; give more rows"
            raise InputError(f"at least 3 folds with rows required, got {got}")
        parts = [torch.nonzero(folds == number)[:, 0] for number in numbers]
        inner = torch.zeros(len(self.penalties), len(parts), dtype=torch.float64)
        for (a, p), (b, q) in combinations(enumerate(parts), 2):
            rows = torch.cat([p, q])
            error = (self.leave_out(target, rows) - target[rows]).square().sum(2)
            inner[:, a] += error[:, len(p) :].sum(1)  # outer a, inner b
            inner[:, b] += error[:, : len(p)].sum(1)
        best = inner.argmin(0)
        predictions = torch.empty_like(target)
        for part, choice in zip(parts, best):
            rest = torch.nonzero(folds != folds[part[0]])[:, 0]
            predictions[part] = self._fits(target, rest, part, self.penalties[choice, None])[0]
        return predictions[:, 0], self.penalties[best]

    def _fits(
        self, y: Tensor, train: Tensor, test: Tensor, penalties: Tensor | None = None
    ) -> Tensor:
        """Predictions (penalties, |test|, c) of the fits on the rows `train`."""
        penalties = self.penalties if penalties is None else penalties
        mean = y[train].mean(0)
        centered = y[train] - mean
        if self._products is None:
            z = self._x[train].mean(0)
            x = self._x[train] - z
            system, right, left = symmetric_product(x.T, x), x.T @ centered, self._x[test] - z
        else:  # centering by the means over the training rows, on the inner products themselves
            system = self._products[train[:, None], train]
            left = self._products[test[:, None], train]
            z = system.mean(0)
            left = left - left.mean(1, keepdim=True) - z + z.mean()
            system, right = system - z[:, None] - z + z.mean(), centered
        return mean + left @ torch.stack([solve(system, penalty, right) for penalty in penalties])


def solve(system: Tensor, penalty: Tensor, right: Tensor) -> Tensor:
    """(system + penalty I)^-1 right for a positive semi-definite system.

    By LU where rounding has made it indefinite. LAPACK's posv in place, by scipy: half the time of
    torch's Cholesky, which copies.
    """
    shifted = system.numpy().copy()
    shifted.flat[:: len(shifted) + 1] += float(penalty)
    _, solution, failed = dposv(shifted.T, right.numpy(), lower=1, overwrite_a=1)
    if failed:
        return torch.linalg.solve(system + penalty * torch.eye(len(system)).to(system), right)
    return torch.from_numpy(solution)
