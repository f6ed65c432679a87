"""Embedding matrices (n proteins, d features) in files: read, or written from a store in parts.

Formats: .pt, .npy, .npz (key X) and .safetensors.
"""

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, atomic, write_json
from distil_rank.proteins.splits import cluster, split
from distil_rank.proteins.store import EmbeddingStore

SUFFIXES = (".pt", ".npy", ".npz", ".safetensors")
IDENTITY = 0.3  # above it, proteins are near relatives (proteins/splits.py)


def load_matrix(path: str | Path) -> Tensor:
    """Embeddings (n, d), n >= 2, in float32 (float64 stays float64); InputError says what is wrong.

    Of a file with several named tensors, the one named X is taken.
    """
    x = read_tensors(path)
    if isinstance(x, dict):
        if "X" not in x and len(x) != 1:
            names = sorted(map(str, x))
            raise InputError(f"one tensor, or one named X, required in {path}, got {names}")
        x = x.get("X", next(iter(x.values())))
    if not isinstance(x, Tensor):
        got = type(x).__name__
        raise InputError(f"a tensor (n, d) required in {path}, got {got}; save the matrix alone")
    if not x.is_floating_point():
        raise InputError(
            f"floating-point embeddings required in {path}, got {x.dtype}; convert them"
        )
    shape = tuple(x.shape)
    if x.ndim != 2:
        raise InputError(
            f"2 axes (proteins, features) required in {path}, got shape {shape}; pool residues"
        )
    if len(x) < 2 or x.shape[1] < 1:
        raise InputError(f"at least 2 rows of 1 feature required in {path}, got shape {shape}")
    bad = int((~x.isfinite()).any(1).sum())
    if bad:
        raise InputError(
            f"finite values required in {path}, got NaN or infinity in {bad} of {len(x)} rows;"
            " remove them"
        )
    return x if x.dtype == torch.float64 else x.float()


def read_tensors(path: str | Path) -> Any:
    """What a .pt, .npy, .npz or .safetensors file holds: a tensor, or a dict of them.

    Nothing is unpickled: a pickle that is more than tensors is refused, never executed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"a file ending in {', '.join(SUFFIXES)} required, got {path}")
    if not path.is_file():
        raise InputError(f"an existing file required, got {path}; check the path")
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return torch.from_numpy(loaded)
        with loaded:
            names = ["X"] if "X" in loaded.files else loaded.files
            return {key: torch.from_numpy(loaded[key]) for key in names}
    except (
        *(OSError, ValueError, TypeError, RuntimeError, EOFError),
        *(pickle.UnpicklingError, SafetensorError, zipfile.BadZipFile),
    ) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"a readable {path.suffix} file of plain tensors required, got {path}: {reason};"
            " nothing was unpickled"
        ) from None


def provenance(path: str | Path) -> Record:
    """What `embeddings.json` beside a matrix says of it (model, source, ...); empty without one."""
    card = Path(path).parent / "embeddings.json"
    try:
        known = json.loads(card.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(
            f"a JSON object required in {card}, got {error}; mend it or remove it"
        ) from None
    return known if isinstance(known, dict) else {}


@dataclass(frozen=True)
class Split:
    """Sorted positions of the train and val proteins, and how they were drawn."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    clusters: int  # of near relatives
    fraction: float
    seed: int


def plan_split(sequences: list[str], fraction: float, seed: int) -> Split:
    """Cluster the proteins and draw whole clusters for val. InputError when that is impossible."""
    labels = cluster(sequences, identity=IDENTITY)
    train, val = split(labels, [fraction], seed)
    return Split(train, val, int(labels.max()) + 1, fraction, seed)


def write_split(store: EmbeddingStore, plan: Split, source: str) -> tuple[Path, Path]:
    """Write embeddings_{train,val}.pt (n, d) and embeddings.json into the store's folder.

    Both matrices are in memory while this runs: 4 bytes per protein and feature in float32.
    """
    paths = store.path / "embeddings_train.pt", store.path / "embeddings_val.pt"
    rows = torch.cat(list(store.batches()))
    for path, positions in zip(paths, (plan.train, plan.val)):
        with atomic(path) as temporary:
            torch.save(rows[torch.from_numpy(positions)], temporary)
    model = ("model", "weights_sha256", "pool", "layers", "dtype", "compute", "long", "max_length")
    drawn = {"fraction": plan.fraction, "identity": IDENTITY, "seed": plan.seed}
    record = {
        "source": source,
        **{key: store.provenance[key] for key in (*model, "proteins_sha256")},
        "split": {**drawn, "clusters": plan.clusters},
        "n_train": len(plan.train),
        "n_val": len(plan.val),
    }
    write_json(store.path / "embeddings.json", record)
    return paths
