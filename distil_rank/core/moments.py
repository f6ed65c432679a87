"""Count, mean and centred second moments of a stream of vectors: all that the closed forms need."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor

from distil_rank.core.records import load_tensors, save_tensors

SCHEMA = "distil-rank/moments/1"
ROWS = 2048  # rows turned to float64 at a time, about: bounds the memory beside the (d, d) scatter
SINGLE = 8192  # rows of one float32 product
BLOCK = 128  # columns per block of the symmetric product: only the upper triangle is computed


class Moments:
    """Streaming moments of vectors x (d,), in float64, mergeable across shards and machines.

    `scatter` is sum_i (x_i - mean)(x_i - mean)^T over `count` rows. Batches are combined as in
    Chan, Golub and LeVeque (1983), so a large mean costs no precision.

    >>> moments = Moments(2).update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
    (2.0, [1.0, 2.0], [[1.0, 2.0], [2.0, 4.0]])
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got dim={dim}")
        self.count = 0.0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._upper = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, x: Tensor | Iterable[Tensor]) -> Moments:
        """Moments of the rows of x (n, d), or of a stream of such batches."""
        if isinstance(x, Tensor):
            return cls(x.shape[-1], x.device).update(x)
        batches = iter(x)
        first = next(batches, None)
        if first is None:
            raise ValueError("moments need at least one batch, got an empty stream")
        moments = cls(first.shape[-1], first.device).update(first)
        for batch in batches:
            moments.update(batch)
        return moments

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    @property
    def scatter(self) -> Tensor:
        """Sum of centred outer products (d, d), symmetric."""
        return mirrored(self._upper)

    @property
    def covariance(self) -> Tensor:
        """Scatter divided by count (d, d): the population covariance of the rows seen."""
        if self.count <= 0:
            raise ValueError("covariance needs at least one row, got none")
        return self.scatter / self.count

    def update(self, x: Tensor, exact: bool = True) -> Moments:
        """Add the rows of x (n, d), any float dtype.

        Without `exact`, rows of at most float32 are centered by block and multiplied in float32;
        sums stay float64. Three times as fast, and the error of a covariance is about 1e-7 of the
        two standard deviations.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"rows of shape (n, {self.dim}) required, got {tuple(x.shape)}")
        if not len(x):
            return self
        if not exact and x.dtype.itemsize <= 4:
            for piece in x.split(SINGLE):
                self._update_single(piece.detach().to(self.mean.device, torch.float32))
            return self
        for piece in x.tensor_split(max(1, round(len(x) / ROWS))):
            rows = piece.detach().to(self.mean.device, torch.float64)
            mean = rows.mean(0)
            if not bool(mean.isfinite().all()):
                bad = int((~rows.isfinite()).any(1).sum())
                raise ValueError(
                    f"finite values required, got NaN or infinity in {bad} of {len(rows)} rows"
                )
            rows = rows - mean
            self._shift(float(len(rows)), mean)
            add_upper_product(self._upper, rows.T, rows)
        return self

    def _update_single(self, rows: Tensor) -> None:
        """Add rows (n, d) by float32 products about a center near their mean."""
        share = rows.new_full((len(rows),), 1 / len(rows))
        center = share @ rows
        rows = rows - center
        rest = (share @ rows).double()  # what rounding left of the mean
        if not bool(rest.isfinite().all()):
            raise ValueError("finite values required, got NaN or infinity")
        if rows.is_cuda:
            product = rows.T @ rows
        else:  # half the work of a general product; the lower triangle of a transposed matrix
            product = torch.from_numpy(ssyrk(1.0, rows.numpy().T, lower=1).T)
        self._shift(float(len(rows)), center.double() + rest)
        self._upper.add_(product).addr_(rest, rest, alpha=-len(rows))

    def merge(self, other: Moments) -> Moments:
        """Add the rows that `other` has seen."""
        if other.dim != self.dim:
            raise ValueError(f"moments of {self.dim} features required, got {other.dim}")
        if other.count:
            self._shift(other.count, other.mean.to(self.mean))
            self._upper += other._upper.to(self._upper)
        return self

    def part(self, columns: slice) -> Moments:
        """Moments of some of the features."""
        return Moments.given(self.count, self.mean[columns], self.scatter[columns, columns])

    def mapped(self, matrix: Tensor, shift: Tensor | None = None) -> Moments:
        """Moments of matrix @ x + shift (k,) from those of x (d,)."""
        mean = matrix @ self.mean
        scatter = symmetric_product(matrix @ self.scatter, matrix.T)
        return Moments.given(self.count, mean if shift is None else mean + shift, scatter)

    def _shift(self, count: float, mean: Tensor) -> None:
        """Move count and mean, and add the between-group term of the scatter."""
        delta = mean - self.mean
        total = self.count + count
        if self.count:
            self._upper.addr_(delta, delta, alpha=self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def state(self) -> dict[str, Tensor]:
        """Count (), mean (d,) and scatter (d, d) on the CPU, apart from the moments themselves."""
        count = torch.tensor(self.count, dtype=torch.float64)
        return {"count": count, "mean": self.mean.cpu().clone(), "scatter": self.scatter.cpu()}

    def save(self, path: str | Path, **provenance: object) -> None:
        """Write count, mean and scatter as safetensors, with provenance as JSON in the header."""
        save_tensors(path, self.state(), SCHEMA, provenance=provenance)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read moments written by `save`; InputError where the file is something else."""
        return cls.from_state(load_tensors(path, SCHEMA, "moments")[0])

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Moments:
        """Moments from what `state` returned, which stays as it is."""
        return cls.given(float(state["count"]), state["mean"], state["scatter"])

    @classmethod
    def given(cls, count: float, mean: Tensor, scatter: Tensor) -> Moments:
        """Moments from copies of their parts, in float64."""
        moments = cls(len(mean), mean.device)
        moments.count, moments.mean, moments._upper = count, mean.clone(), scatter.clone()
        return moments


def add_upper_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (d, n) @ right (n, d), known to be symmetric, to the upper triangle of total."""
    for start in range(0, len(total), BLOCK):
        total[start : start + BLOCK, start:] += left[start : start + BLOCK] @ right[:, start:]


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix (d, d) with this upper triangle; what is below it is ignored."""
    return upper.triu() + upper.triu(1).T


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """left (d, n) @ right (n, d) known to be symmetric: half the work, exactly symmetric."""
    product = left.new_zeros(len(left), len(left))
    add_upper_product(product, left, right)
    return mirrored(product)
