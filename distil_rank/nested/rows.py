"""Row-wise aligned embeddings: the same residues of the same proteins in every size, or an error.

Their joint moments, all sizes side by side, come from one streaming pass. Every stage and every
baseline follows from these.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.resume import Checkpoint
from distil_rank.proteins.store import EmbeddingStore, shard_path

BATCH = 4096  # rows read at a time (whole proteins)
SAVE_EVERY = 64  # batches between two checkpoints


class Rows(Protocol):
    """Embeddings of one model: `lengths[i]` rows of protein i, whose sequence is `keys[i]`."""

    dim: int
    lengths: Sequence[int]
    keys: Sequence[str]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of proteins start ... stop - 1, concatenated (rows, dim)."""
        ...


class TensorRows:
    """Rows in memory: values (n, d); one row per protein unless `lengths` says otherwise."""

    def __init__(
        self,
        values: Tensor | np.ndarray,
        lengths: Sequence[int] | None = None,
        keys: Sequence[str] | None = None,
    ):
        values = torch.as_tensor(values)
        if values.ndim != 2 or not values.is_floating_point():
            got = f"{values.dtype} {tuple(values.shape)}"
            raise InputError(f"embeddings (rows, features) of a float type required, got {got}")
        self.values, self.dim = values, values.shape[1]
        self.lengths: Sequence[int] = [1] * len(values) if lengths is None else list(lengths)
        count = len(self.lengths)
        self.keys: Sequence[str] = list(map(str, range(count))) if keys is None else list(keys)
        if sum(self.lengths) != len(values) or len(self.keys) != count:
            got = f"{sum(self.lengths)} and {len(self.keys)}"
            raise InputError(f"lengths and keys of {len(values)} rows required, got {got}")
        self._starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()

    def read(self, start: int, stop: int) -> Tensor:
        return self.values[self._starts[start] : self._starts[stop]]


class StoreRows:
    """Rows of a store, of residues or of proteins, read run by run at its last layer."""

    def __init__(self, path: str | Path):
        self.store = EmbeddingStore(path)
        self._tensor = f"layer_{self.store.provenance['layers'][-1]}"
        self.dim = self.store.dim
        self.lengths: Sequence[int] = self.store.column("rows")
        self.keys: Sequence[str] = self.store.column("sha256")
        self._shard, self._first = self.store.column("shard"), self.store.column("first_row")

    def read(self, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:  # one slice per shard
            shard, first, last = self._shard[start], self._first[start], start
            while last + 1 < stop and self._shard[last + 1] == shard:
                last += 1
            parts.append(
                self.read_shard(shard, first, self._first[last] + self.lengths[last] - first)
            )
            start = last + 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_shard(self, shard: int, start: int, rows: int) -> Tensor:
        """Rows (rows, d) of one shard.

        Opened anew each time: of a shard that stays mapped, all that was read stays resident.
        """
        path = shard_path(self.store.path, shard)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice(self._tensor)[start : start + rows]
        except (OSError, SafetensorError) as error:
            raise InputError(f"a whole shard required, got {path} ({error}); embed again") from None

    def shard_sizes(self) -> list[int]:
        """Rows of every shard."""
        return np.bincount(self._shard, self.lengths).astype(int).tolist()


def as_rows(stores: Mapping[str, Rows | Tensor | np.ndarray]) -> dict[str, Rows]:
    """The stores by size, checked: the same proteins in the same order, with as many rows."""
    rows: dict[str, Rows] = {
        name: TensorRows(store) if isinstance(store, Tensor | np.ndarray) else store
        for name, store in stores.items()
    }
    if len(rows) < 2:
        got = ", ".join(rows) or "none"
        raise InputError(f"at least two sizes required, got {got}; add a larger or a smaller model")
    (first, base), *others = rows.items()
    for name, other in others:
        pairs = zip_longest(zip(base.keys, base.lengths), zip(other.keys, other.lengths))
        for i, (a, b) in enumerate(pairs, start=1):
            if a is None or b is None or a[0] != b[0]:
                raise InputError(
                    f"the same proteins in the same order required in {first} and {name}, got"
                    f" others from number {i} on; embed the same FASTA"
                )
            if a[1] != b[1]:
                raise InputError(
                    f"one row per residue in every size required, got {a[1]} rows in {first} and"
                    f" {b[1]} in {name} for protein {i}: different tokenization, pooling or"
                    " truncation; embed both the same way"
                )
    return rows


def check_order(widths: Mapping[str, int]) -> None:
    if any(a >= b for a, b in pairwise(widths.values())):
        got = ", ".join(f"{name} ({width})" for name, width in widths.items())
        remedy = "give the smallest first"
        raise InputError(f"sizes in order of growing width required, got {got}; {remedy}")


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a protein is held out: by its sequence alone, so equal ones stay on one side."""
    digest = hashlib.sha256(f"held-out/{key}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2.0**64


def batches(lengths: Sequence[int], start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """Cut proteins start ... stop - 1 into runs (from, to) of about `rows` rows, whole proteins."""
    first, total = start, 0
    for protein in range(start, stop):
        total += lengths[protein]
        if total >= rows or protein == stop - 1:
            yield first, protein + 1
            first, total = protein + 1, 0


def joint_moments(
    stores: Mapping[str, Rows | Tensor | np.ndarray],
    held_out: float = 0.1,
    checkpoint: Checkpoint | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int], object] | None = None,
    exact: bool = False,
) -> tuple[Moments, Moments]:
    """Moments of all sizes side by side over the fitted and over the held-out proteins.

    Memory O((sum of widths)^2), whatever the number of rows. `shard` (i, n) takes the i-th of n
    equal runs of proteins; shards are merged with `Moments.merge`. With `checkpoint`, a killed pass
    goes on where it was, with an equal result. `progress` is called with the rows done. With
    `exact`, products are in float64 too.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"a held-out fraction in [0, 1) required, got {held_out}")
    rows = as_rows(stores)
    base = next(iter(rows.values()))
    proteins, dim = len(base.lengths), sum(r.dim for r in rows.values())
    start, stop = proteins * shard[0] // shard[1], proteins * (shard[0] + 1) // shard[1]
    fitted, other = Moments(dim), Moments(dim)
    state = checkpoint.load() if checkpoint else None
    if state:
        start = state["done"]
        fitted, other = (Moments.from_state(state[side]) for side in ("fitted", "held out"))
    out = torch.tensor([is_held_out(key, held_out) for key in base.keys], dtype=torch.bool)
    lengths = torch.tensor(base.lengths, dtype=torch.long)
    for number, (first, last) in enumerate(batches(base.lengths, start, stop, BATCH), start=1):
        x = torch.cat([part.read(first, last) for part in rows.values()], 1)
        is_out = out[first:last].repeat_interleave(lengths[first:last])
        try:  # the moments refuse what is not finite: one pass less over the rows
            fitted.update(x[~is_out] if bool(is_out.any()) else x, exact=exact)
            other.update(x[is_out], exact=exact)
        except ValueError:
            bad = [n for n, part in rows.items() if not part.read(first, last).isfinite().all()]
            got = f"NaN or infinity in {', '.join(bad)}; embed again in float32"
            raise InputError(f"finite embeddings required, got {got}") from None
        if progress is not None:
            progress(len(x))
        if checkpoint and number % SAVE_EVERY == 0:
            checkpoint.save({"done": last, "fitted": fitted.state(), "held out": other.state()})
    return fitted, other
