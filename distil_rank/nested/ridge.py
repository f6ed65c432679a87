"""Ridge regression with nested cross-validation over a whole penalty path, exact, from one eigendecomposition.

With centred features X = U diag(s)^1/2 V^T and an unpenalised intercept, the residual of a fit on all n rows is M y,

    M = I - 1 1^T / n - U diag(s / (s + penalty)) U^T

and leaving out any set g of rows changes the residuals there to (M_gg)^-1 (M y)_g: exactly what a fit without g would give.
So one eigendecomposition serves every penalty, every outer fold and every pair of an outer and an inner fold.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import torch
from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.statistics.moments import add_upper_product, mirrored

PENALTIES = torch.logspace(-8, 2, 21, dtype=torch.float64)  # in units of the mean squared norm of the centred rows


class RidgePath:
    """Ridge of y (n,) or (n, c) on features (n, d), for a path of penalties (in the units of `PENALTIES`)."""

    def __init__(self, features: Tensor, penalties: Tensor = PENALTIES):
        if features.ndim != 2 or len(features) < 3 or not bool(features.isfinite().all()):
            raise InputError(f"finite features (n >= 3, d) required, got shape {tuple(features.shape)}")
        x = features.double()
        n, d = x.shape
        self.mean = x.mean(0)
        self._x = x - self.mean
        if d < n:
            s, V = torch.linalg.eigh(self._x.T @ self._x)
            U = self._x @ V
        else:
            s, U = torch.linalg.eigh(self._x @ self._x.T)
        varies = s > torch.finfo(torch.float64).eps * max(n, d) * s.max().clamp_min(1e-300)
        s = s[varies]
        U = U[:, varies] / s.sqrt() if d < n else U[:, varies]
        self._s, self._U = s, U
        self.penalties = penalties * float(self._x.square().sum()) / n
        if len(s) == 0:
            self.penalties = penalties.clone()  # constant features: only the intercept is fitted
        # rank n - 1: the part of M that no penalty touches is exactly zero, and must not be left to rounding
        self._full = len(s) == n - 1

    def _operator(self, i: int, rows: Tensor) -> Tensor:
        """The block of M at these rows and columns, for the i-th penalty; only its upper triangle is computed."""
        U, damping = self._U[rows], self.penalties[i] / (self._s + self.penalties[i])
        M = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        if self._full:
            add_upper_product(M, U * damping, U.T)
        else:  # I - 1 1^T / n - U diag(s / (s + penalty)) U^T
            M -= 1 / len(self._U)
            M.diagonal().add_(1)
            add_upper_product(M, U * (damping - 1), U.T)
        return M

    def _residuals(self, y: Tensor, i: int) -> Tensor:
        """M y (n, c)."""
        damping = (self.penalties[i] / (self._s + self.penalties[i]))[:, None]
        projected = self._U.T @ y
        return self._U @ (damping * projected) if self._full else y - y.mean(0) - self._U @ ((1 - damping) * projected)

    def leave_out(self, y: Tensor, rows: Tensor) -> Tensor:
        """Predictions (penalties, |rows|, c) at `rows` of the fits on all other rows; y (n, c)."""
        blocks = (solve(self._operator(i, rows), self._residuals(y, i)[rows]) for i in range(len(self.penalties)))
        return y[rows] - torch.stack(list(blocks))

    def nested(self, y: Tensor, folds: Tensor) -> tuple[Tensor, Tensor]:
        """Out-of-fold predictions (as y) and the penalty of each outer fold (folds,), for fold numbers (n,).

        The penalty of an outer fold has the least squared error over the other folds as inner folds, without the outer
        fold's rows; then the fit on all other folds predicts it.
        """
        target = y.double() if y.ndim == 2 else y.double()[:, None]
        order = folds.argsort(stable=True)
        sizes = folds.unique(return_counts=True)[1].tolist()
        if len(sizes) < 3:
            raise InputError(f"at least 3 folds with rows required, got {len(sizes)}; give more rows")
        starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        parts = [slice(a, b) for a, b in pairwise(starts)]
        inner = torch.zeros(len(self.penalties), len(sizes), dtype=torch.float64)
        left_out = torch.empty(len(self.penalties), *target.shape, dtype=torch.float64)  # errors, in the order of folds
        rows = torch.arange(len(order))
        for i in range(len(self.penalties)):
            residual = self._residuals(target, i)[order]
            M = self._operator(i, order)
            for part in parts:
                left_out[i, part] = solve(M[part, part], residual[part])
            for (a, p), (b, q) in combinations(enumerate(parts), 2):
                both = torch.cat([rows[p], rows[q]])
                error = solve(M[both[:, None], both], residual[both]).square().sum(1)
                inner[i, a] += error[sizes[a] :].sum()  # outer a, inner b
                inner[i, b] += error[: sizes[a]].sum()
        best = inner.argmin(0)
        predictions = torch.empty_like(target)
        for part, choice in zip(parts, best):
            predictions[order[part]] = target[order[part]] - left_out[choice, part]
        return predictions.view(y.shape), self.penalties[best]

    def choose(self, y: Tensor, folds: Tensor) -> Tensor:
        """The penalty (a scalar tensor) with the least squared error over these folds; y (n, c)."""
        error = torch.zeros(len(self.penalties), dtype=torch.float64)
        for fold in folds.unique():
            rows = torch.nonzero(folds == fold)[:, 0]
            error += (self.leave_out(y.double(), rows) - y[rows]).square().sum((1, 2))
        return self.penalties[error.argmin()]

    def predict(self, y: Tensor, penalty: Tensor, features: Tensor) -> Tensor:
        """Predictions (m, c) for new features (m, d) of the fit of y (n, c) on all rows with this penalty."""
        y = y.double()
        # w = X^T (K + penalty I)^-1 (y - mean y), on the range of X
        weights = self._x.T @ (self._U / (self._s + penalty) @ (self._U.T @ y))
        return (features.double() - self.mean) @ weights + y.mean(0)


def solve(M: Tensor, residual: Tensor) -> Tensor:
    """M^-1 residual for a positive definite M given by its upper triangle; by LU where rounding has made it indefinite."""
    factor, failed = torch.linalg.cholesky_ex(M, upper=True)
    return (
        torch.linalg.solve(mirrored(M), residual) if int(failed) else torch.cholesky_solve(residual, factor, upper=True)
    )
