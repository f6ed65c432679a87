"""Row-wise aligned embeddings of several models: the same residues of the same proteins, in the same order, or an error."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.statistics.moments import Moments

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
        self.lengths = [1] * len(values) if lengths is None else list(lengths)
        self.keys = [str(i) for i in range(len(self.lengths))] if keys is None else list(keys)
        if sum(self.lengths) != len(values) or len(self.keys) != len(self.lengths):
            raise InputError(
                f"lengths and keys of {len(values)} rows required, got {sum(self.lengths)} and {len(self.keys)}"
            )
        self._starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()

    def read(self, start: int, stop: int) -> Tensor:
        return self.values[self._starts[start] : self._starts[stop]]


def as_rows(stores: Mapping[str, Rows | Tensor]) -> dict[str, Rows]:
    """The stores by size, checked: widths increase, and every store has the same proteins with as many rows each."""
    rows: dict[str, Rows] = {k: TensorRows(v) if isinstance(v, Tensor) else v for k, v in stores.items()}
    if len(rows) < 2:
        raise InputError(
            f"at least two sizes required, got {', '.join(rows) or 'none'}; add a larger or a smaller model"
        )
    check_order({name: r.dim for name, r in rows.items()})
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
                f"one row per residue in every size required, got {base.lengths[at]} rows in {first} and {other.lengths[at]} in"
                f" {name} for protein {at + 1}: different tokenisation, pooling or truncation; embed both the same way"
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


def batches(rows: Mapping[str, Rows], chosen: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Position in `chosen` after each batch, and the batch's proteins (about `size` rows, whole proteins)."""
    lengths = next(iter(rows.values())).lengths
    batch: list[int] = []
    total = 0
    for position, protein in enumerate(chosen, start=1):
        batch.append(protein)
        total += lengths[protein]
        if total >= size or position == len(chosen):
            yield position, batch
            batch, total = [], 0


def read_joined(rows: Mapping[str, Rows], proteins: Sequence[int]) -> Tensor:
    """All sizes side by side (rows, sum of widths), float32 or wider, for these proteins; InputError on NaN."""
    parts = []
    for name, source in rows.items():
        runs = contiguous(proteins)
        part = torch.cat([source.read(a, b) for a, b in runs]) if len(runs) > 1 else source.read(*runs[0])
        if not bool(part.isfinite().all()):
            bad = int((~part.isfinite()).any(1).sum())
            raise InputError(
                f"finite embeddings required, got NaN or infinity in {bad} rows of {name}; embed again in float32"
            )
        parts.append(part if part.dtype == torch.float64 else part.float())
    return torch.cat(parts, 1)


def contiguous(proteins: Sequence[int]) -> list[tuple[int, int]]:
    """Runs (start, stop) of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for i in proteins:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def joint_moments(
    stores: Mapping[str, Rows | Tensor],
    held_out: float = 0.1,
    checkpoint: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int], object] | None = None,
) -> tuple[Moments, Moments]:
    """Moments of all sizes side by side over the fitted and over the held-out proteins: one streaming pass.

    Everything later (each stage, every baseline) follows from these; memory O((sum of widths)^2), whatever the number of
    rows. `shard` (i, n) takes every n-th protein from the i-th; shards are merged with `Moments.merge`. With `checkpoint`, a
    killed pass goes on where it was, with an equal result. `progress` is called with the rows done.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"a held-out fraction in [0, 1) required, got {held_out}")
    rows = as_rows(stores)
    base = next(iter(rows.values()))
    chosen = range(shard[0], len(base.lengths), shard[1])
    dim = sum(r.dim for r in rows.values())
    parts = Moments(dim), Moments(dim)
    done = 0
    identity = hashlib.sha256(
        json.dumps([{k: r.dim for k, r in rows.items()}, list(base.keys), held_out, shard]).encode()
    ).hexdigest()
    if checkpoint is not None and checkpoint.exists():
        done, parts = load_checkpoint(checkpoint, identity)
    side = [is_held_out(key, held_out) for key in base.keys]
    for number, (position, batch) in enumerate(batches(rows, list(chosen)[done:], BATCH), start=1):
        for part, is_out in zip(parts, (False, True)):
            proteins = [i for i in batch if side[i] == is_out]
            if proteins:
                part.update(read_joined(rows, proteins))
        if progress is not None:
            progress(sum(base.lengths[i] for i in batch))
        if checkpoint is not None and number % SAVE_EVERY == 0:
            save_checkpoint(checkpoint, done + position, parts, identity)
    return parts


def save_checkpoint(path: Path, done: int, parts: tuple[Moments, Moments], identity: str) -> None:
    tensors = {
        f"{name}.{key}": value for name, part in zip(("fit", "held_out"), parts) for key, value in part.state().items()
    }
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    save_file(tensors, temporary, metadata={"done": str(done), "identity": identity})
    os.replace(temporary, path)


def load_checkpoint(path: Path, identity: str) -> tuple[int, tuple[Moments, Moments]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("identity") != identity:
                raise InputError(
                    f"the same stores and options as when {path} was begun required; delete it or choose another folder"
                )
            parts = [
                Moments.from_state({key: file.get_tensor(f"{n}.{key}") for key in ("count", "mean", "scatter")})
                for n in ("fit", "held_out")
            ]
            return int(metadata["done"]), (parts[0], parts[1])
    except SafetensorError as error:
        raise InputError(f"a checkpoint of this command required, got {path}: {error}; delete it") from None
