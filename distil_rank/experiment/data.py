"""Training and held-out embeddings, and what is known about them."""

from pathlib import Path

from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, sha256, shown_path
from distil_rank.proteins.embedding_files import load_matrix, provenance


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
    known = provenance(train)
    about = {
        "source": source or known.get("source") or shown_path(train),
        "model": model or known.get("model"),
        "sha256": {"train": sha256(train), "val": sha256(val)},
        "files": [shown_path(path) for path in (train, val)],
    }
    return x, x_val, about
