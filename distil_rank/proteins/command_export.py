"""Copy the vectors of a store into one file that other programs read: .npz, .h5 or .parquet.

    distil-rank export store/ --out vectors.npz
    distil-rank export store/ --out vectors.parquet

`X` (rows, d) holds the vectors in the order of the FASTA, `ids` (rows,) the protein of each row,
repeated in a store of residues; in Parquet the columns are `id` and `vector`. All vectors are in
memory at once; bfloat16 becomes float32. .h5 takes the package h5py, .parquet pyarrow.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from distil_rank.core.errors import InputError
from distil_rank.core.records import atomic, require_writable
from distil_rank.proteins.store import EmbeddingStore

PACKAGES = {".npz": "numpy", ".h5": "h5py", ".parquet": "pyarrow"}


@dataclass(frozen=True)
class Config:
    store: Annotated[Path, tyro.conf.Positional]  # folder written by `embed`
    out: Path  # where to write
    layer: int | None = None  # which of several stored layers (default: the last one stored)


def run(config: Config) -> None:
    """Write `config.out`. InputError before anything is read."""
    suffix = config.out.suffix
    if suffix not in PACKAGES or config.out.is_dir():
        raise InputError(f"a file ending in {', '.join(PACKAGES)} required, got {config.out}")
    try:
        package = importlib.import_module(PACKAGES[suffix])
    except ImportError:
        name = PACKAGES[suffix]
        raise InputError(f"the package {name} required for {suffix}; pip install {name}") from None
    store = EmbeddingStore(config.store, config.layer)
    require_writable(config.out.absolute().parent)
    repeats = store.column("rows")
    ids = [id for id, rows in zip(store.ids, repeats) for _ in range(rows)]
    with atomic(config.out) as temporary:
        _write(temporary, suffix, package, store.to_numpy(), ids)
    print(f"{config.out}: {store.rows} vectors of {store.dim} features of {len(store)} proteins")


def _write(path: Path, suffix: str, package: Any, x: NDArray[Any], ids: Sequence[str]) -> None:
    if suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, X=x, ids=np.array(ids, dtype=np.str_))
    elif suffix == ".h5":
        with package.File(path, "w") as file:
            file["X"], file["ids"] = x, list(ids)
    else:
        parquet = importlib.import_module("pyarrow.parquet")
        vectors = package.FixedSizeListArray.from_arrays(package.array(x.ravel()), x.shape[1])
        parquet.write_table(package.table({"id": package.array(ids), "vector": vectors}), path)
