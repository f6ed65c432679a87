"""Ridge regression with nested cross-validation over a whole penalty path, exact, from one eigendecomposition.

With centred features X = U diag(s)^1/2 V^T and an unpenalised intercept, the residual of a fit on all n rows is M y,

    M = I - 1 1^T / n - U diag(s / (s + penalty)) U^T

and leaving out any set g of rows changes the residuals there to (M_gg)^-1 (M y)_g: exactly what a fit without g would give.
So one eigendecomposition serves every penalty, every outer fold and every pair of an outer and an inner fold.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from distil_rank.errors import InputError

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
        # rank n - 1: the part of M that no penalty touches is exactly zero, and is not left to rounding
        self._full = len(s) == n - 1

    def _damping(self) -> Tensor:
        """penalty / (s + penalty), (penalties, rank)."""
        return self.penalties[:, None] / (self._s + self.penalties[:, None])

    def _untouched(self, rows: Tensor) -> Tensor:
        """I - 1 1^T / n - U U^T on these rows."""
        if self._full:
            return torch.zeros(len(rows), len(rows), dtype=torch.float64)
        U = self._U[rows]
        return torch.eye(len(rows), dtype=torch.float64) - 1 / len(self._U) - U @ U.T

    def _residuals(self, y: Tensor) -> Tensor:
        """M y for every penalty (penalties, n, c)."""
        projected = self._U.T @ y
        untouched = torch.zeros_like(y) if self._full else y - y.mean(0) - self._U @ projected
        return untouched + self._U @ (self._damping()[:, :, None] * projected)

    def leave_out(self, y: Tensor, rows: Tensor) -> Tensor:
        """Predictions (penalties, |rows|, c) at `rows` of the fits on all other rows; y (n, c)."""
        return self._leave_out(y, self._residuals(y), rows)

    def _leave_out(self, y: Tensor, residuals: Tensor, rows: Tensor) -> Tensor:
        U = self._U[rows]
        M = self._untouched(rows) + (U * self._damping()[:, None, :]) @ U.T
        return y[rows] - torch.linalg.solve(M, residuals[:, rows])

    def nested(self, y: Tensor, folds: Tensor) -> tuple[Tensor, Tensor]:
        """Out-of-fold predictions (as y) and the penalty of each outer fold (folds,), for fold numbers (n,).

        The penalty of an outer fold has the least squared error over the other folds as inner folds, without the outer
        fold's rows; then the fit on all other folds predicts it.
        """
        target = y.double() if y.ndim == 2 else y.double()[:, None]
        members = [torch.nonzero(folds == f)[:, 0] for f in folds.unique()]
        if len(members) < 3:
            raise InputError(f"at least 3 folds with rows required, got {len(members)}; give more rows")
        residuals = self._residuals(target)
        inner = torch.zeros(len(members), len(self.penalties), dtype=torch.float64)
        for a, b in combinations(range(len(members)), 2):
            both = torch.cat([members[a], members[b]])
            error = (self._leave_out(target, residuals, both) - target[both]).square().sum(2)
            inner[a] += error[:, len(members[a]) :].sum(1)  # outer a, inner b
            inner[b] += error[:, : len(members[a])].sum(1)
        predictions = torch.empty_like(target)
        best = inner.argmin(1)
        for rows, choice in zip(members, best):
            predictions[rows] = self._leave_out(target, residuals, rows)[choice]
        return predictions.view(y.shape), self.penalties[best]

    def choose(self, y: Tensor, folds: Tensor) -> Tensor:
        """The penalty (a scalar tensor) with the least squared error over these folds; y (n, c)."""
        residuals = self._residuals(y.double())
        error = torch.zeros(len(self.penalties), dtype=torch.float64)
        for f in folds.unique():
            rows = torch.nonzero(folds == f)[:, 0]
            error += (self._leave_out(y.double(), residuals, rows) - y[rows]).square().sum((1, 2))
        return self.penalties[error.argmin()]

    def predict(self, y: Tensor, penalty: Tensor, features: Tensor) -> Tensor:
        """Predictions (m, c) for new features (m, d) of the fit of y (n, c) on all rows with this penalty."""
        y = y.double()
        # w = X^T (K + penalty I)^-1 (y - mean y), on the range of X
        weights = self._x.T @ (self._U / (self._s + penalty) @ (self._U.T @ y))
        return (features.double() - self.mean) @ weights + y.mean(0)
