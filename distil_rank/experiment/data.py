"""Training and held-out embeddings, what is known about them, and whether a layer fits them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.prior import FOLDS, merged
from distil_rank.core.randomness import generator
from distil_rank.core.records import Record, sha256, shown_path
from distil_rank.proteins.embedding_files import load_matrix, provenance, rows_in

ROWS = 8192  # on which a teacher's output is looked at
SCALES = (1e-6, 1e6)  # spreads that float32 and the learning rates are made for


@dataclass(frozen=True)
class Rows:
    """Training and held-out embeddings (n, d), and their moments."""

    x: Tensor
    x_val: Tensor
    folds: list[Moments]  # of the training rows, drawn at random
    moments: Moments  # of all training rows
    held_out: Moments

    @classmethod
    def of(cls, x: Tensor, x_val: Tensor) -> Rows:
        order = torch.randperm(len(x), generator=generator(0, "folds")).to(x.device)
        folds = [Moments.of(x[part]) for part in order.chunk(FOLDS)]
        return cls(x, x_val, folds, merged(folds), Moments.of(x_val))


def load_pair(
    train: Path, val: Path, source: str = "", model: str = ""
) -> tuple[Tensor, Tensor, Record]:
    """Two matrices (n, d) of one width in float32, their names and digests.

    Where `source` or `model` is empty, `embeddings.json` beside the matrix names it.
    """
    x, x_val = (load_matrix(path).float() for path in (train, val))
    if x.shape[1] != x_val.shape[1]:
        found = f"{x.shape[1]} and {x_val.shape[1]} features"
        raise InputError(f"train and val of one width required, got {found}")
    for rows, path in ((x, train), (x_val, val)):
        if bool((rows == rows[0]).all()):
            raise InputError(f"rows that differ required, got one row {len(rows)} times in {path}")
        spread = float(rows.double().std(0).norm())
        if not SCALES[0] <= spread <= SCALES[1]:
            raise InputError(
                f"a spread between {SCALES[0]:g} and {SCALES[1]:g} required, got {spread:.1e} in"
                f" {path}; divide both matrices by it"
            )
    known = provenance(train)
    if model and known.get("model", model) != model:
        raise InputError(
            f"--embedding-model {known['model']!r} required, as embeddings.json beside {train}"
            f" says, got {model!r}; leave the flag out"
        )
    about = {
        "source": source or known.get("source") or shown_path(train),
        "model": model or known.get("model"),
        "sha256": {"train": sha256(train), "val": sha256(val)},
        "files": [shown_path(path) for path in (train, val)],
        "shared_rows": int(rows_in(x, x_val).sum()),
    }
    return x, x_val, about


def fitting_rank(x: Tensor, head: nn.Sequential | None, rank: int | None) -> int:
    """The rank of the students: d / 20 unless given, at most what the user's one layer allows.

    InputError unless the user's head takes these embeddings, and the rank fits every layer.
    """
    dim = x.shape[1]
    layers = [part for part in head or () if isinstance(part, nn.Linear)]
    if layers and layers[0].in_features != dim:
        raise InputError(f"a teacher of {dim} inputs required, got one of {layers[0].in_features}")
    outputs = None if head is None else head(x[:ROWS].to(layers[0].weight))
    if outputs is not None and bool((outputs == outputs[0]).all()):
        raise InputError("a teacher whose output varies required, got a constant; check --key")
    limit = min(dim, layers[0].out_features) if head is not None and len(head) == 1 else dim
    if rank is None:
        return min(limit, max(1, dim // 20))
    if not 1 <= rank <= limit:
        raise InputError(f"--rank must be between 1 and {limit} for these layers, got {rank}")
    return rank
