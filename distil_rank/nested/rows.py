"""Row-wise aligned embeddings of several models: the same residues of the same proteins in the same order, or an error."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments

BATCH = 4096  # rows read at a time (whole proteins)
SAVE_EVERY = 64  # batches between two checkpoints


class Rows(Protocol):
    """Embeddings of one model: `lengths[i]` rows of protein i, whose sequence is identified by `keys[i]`."""

    dim: int
    lengths: Sequence[int]
    keys: Sequence[str]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of proteins start ... stop - 1, concatenated (rows, dim)."""
        ...


class TensorRows:
    """Rows held in memory: values (n, d); one row per protein unless `lengths` says otherwise."""

    def __init__(self, values: Tensor, lengths: Sequence[int] | None = None, keys: Sequence[str] | None = None):
        if values.ndim != 2 or not values.is_floating_point():
            raise InputError(
                f"embeddings (rows, features) of a float type required, got {values.dtype} {tuple(values.shape)}"
            )
        self.values, self.dim = values, values.shape[1]
        self.lengths: Sequence[int] = [1] * len(values) if lengths is None else list(lengths)
        self.keys: Sequence[str] = [str(i) for i in range(len(self.lengths))] if keys is None else list(keys)
        if sum(self.lengths) != len(values) or len(self.keys) != len(self.lengths):
            raise InputError(
                f"lengths and keys of {len(values)} rows required, got {sum(self.lengths)} and {len(self.keys)}"
            )
        self._starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()

    def read(self, start: int, stop: int) -> Tensor:
        return self.values[self._starts[start] : self._starts[stop]]


def as_rows(stores: Mapping[str, Rows | Tensor]) -> dict[str, Rows]:
    """The stores by size, checked: each has the same proteins in the same order, with as many rows."""
    rows: dict[str, Rows] = {}
    for name, store in stores.items():
        rows[name] = TensorRows(store) if isinstance(store, Tensor) else store
    if len(rows) < 2:
        raise InputError(
            f"at least two sizes required, got {', '.join(rows) or 'none'}; add a larger or a smaller model"
        )
    (first, base), *others = rows.items()
    for name, other in others:
        if list(base.keys) != list(other.keys):
            short = f"{len(base.keys)} and {len(other.keys)} proteins"
            at = next((i for i, (a, b) in enumerate(zip(base.keys, other.keys)) if a != b), None)
            where = short if at is None else f"different sequences at position {at + 1}"
            raise InputError(
                f"the same proteins in the same order required in {first} and {name}, got {where}; embed the same FASTA"
            )
        if list(base.lengths) != list(other.lengths):
            at = next(i for i, (a, b) in enumerate(zip(base.lengths, other.lengths)) if a != b)
            raise InputError(
                f"one row per residue in every size required, got {base.lengths[at]} rows in {first} and"
                f" {other.lengths[at]} in {name} for protein {at + 1}: different tokenisation, pooling or truncation;"
                " embed both the same way"
            )
    return rows


def check_order(widths: Mapping[str, int]) -> None:
    if any(a >= b for a, b in zip(list(widths.values()), list(widths.values())[1:])):
        got = ", ".join(f"{name} ({width})" for name, width in widths.items())
        raise InputError(f"sizes in order of growing width required, got {got}; give the smallest first")


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a protein is held out: decided by its sequence alone, so equal sequences stay on one side."""
    digest = hashlib.sha256(f"held-out/{key}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2.0**64


def batches(lengths: Sequence[int], start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """Cut proteins start ... stop - 1 into runs (from, to) of about `rows` rows, whole proteins each."""
    first, total = start, 0
    for protein in range(start, stop):
        total += lengths[protein]
        if total >= rows or protein == stop - 1:
            yield first, protein + 1
            first, total = protein + 1, 0


def read_joined(rows: Mapping[str, Rows], start: int, stop: int) -> Tensor:
    """All sizes side by side (rows, sum of widths), float64, for proteins start ... stop - 1."""
    parts = [source.read(start, stop) for source in rows.values()]
    joined = torch.empty(len(parts[0]), sum(p.shape[1] for p in parts), dtype=torch.float64)
    for block, part in zip(joined.split([p.shape[1] for p in parts], 1), parts):
        block.copy_(part)
    return joined


def check_finite(rows: Mapping[str, Rows], start: int, stop: int) -> None:
    """InputError that names the size which holds NaN or infinity in these proteins."""
    for name, source in rows.items():
        bad = int((~source.read(start, stop).isfinite()).any(1).sum())
        if bad:
            raise InputError(
                f"finite embeddings required, got NaN or infinity in {bad} rows of {name}; embed again in float32"
            )


def joint_moments(
    stores: Mapping[str, Rows | Tensor],
    held_out: float = 0.1,
    checkpoint: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int], object] | None = None,
) -> tuple[Moments, Moments]:
    """Moments of all sizes side by side over the fitted and over the held-out proteins: one streaming pass.

    Everything later (each stage, every baseline) follows from these; memory O((sum of widths)^2), whatever the number
    of rows. `shard` (i, n) takes the i-th of n equal runs of proteins; shards are merged with `Moments.merge`. With
    `checkpoint`, a killed pass goes on where it was, with an equal result. `progress` is called with the rows done.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"a held-out fraction in [0, 1) required, got {held_out}")
    rows = as_rows(stores)
    base = next(iter(rows.values()))
    proteins, dim = len(base.lengths), sum(r.dim for r in rows.values())
    start, stop = proteins * shard[0] // shard[1], proteins * (shard[0] + 1) // shard[1]
    inputs = [{name: r.dim for name, r in rows.items()}, list(base.keys), held_out, shard]
    identity = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    fitted, other = Moments(dim), Moments(dim)
    if checkpoint is not None and checkpoint.exists():
        start, fitted, other = load_checkpoint(checkpoint, identity)
    out = torch.tensor([is_held_out(key, held_out) for key in base.keys], dtype=torch.bool)
    lengths = torch.tensor(base.lengths, dtype=torch.long)
    for number, (first, last) in enumerate(batches(base.lengths, start, stop, BATCH), start=1):
        x = read_joined(rows, first, last)
        is_out = out[first:last].repeat_interleave(lengths[first:last])
        try:  # the moments refuse what is not finite: one pass less over the rows
            fitted.update(x[~is_out] if bool(is_out.any()) else x)
            other.update(x[is_out])
        except ValueError:
            check_finite(rows, first, last)
            raise
        if progress is not None:
            progress(len(x))
        if checkpoint is not None and number % SAVE_EVERY == 0:
            save_checkpoint(checkpoint, last, fitted, other, identity)
    return fitted, other


def save_checkpoint(path: Path, done: int, fitted: Moments, other: Moments, identity: str) -> None:
    named = {"fit": fitted, "held_out": other}
    tensors = {f"{name}.{key}": value for name, part in named.items() for key, value in part.state().items()}
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    save_file(tensors, temporary, metadata={"done": str(done), "identity": identity})
    os.replace(temporary, path)


def load_checkpoint(path: Path, identity: str) -> tuple[int, Moments, Moments]:
    remedy = "delete it or choose another folder"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                raise InputError(f"the same stores and options as when {path} was begun required; {remedy}")
            keys = ("count", "mean", "scatter")
            fitted, other = ({key: file.get_tensor(f"{n}.{key}") for key in keys} for n in ("fit", "held_out"))
            return int(metadata["done"]), Moments.from_state(fitted), Moments.from_state(other)
    except SafetensorError as error:
        raise InputError(f"a checkpoint of this command required, got {path} ({error}); {remedy}") from None
