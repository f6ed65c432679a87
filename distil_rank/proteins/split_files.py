"""Two matrices from a store, as `main.py` reads them: no val protein is a near relative of a train protein."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from distil_rank.proteins.splits import cluster, split
from distil_rank.proteins.store import EmbeddingStore
from distil_rank.core.records import write_json

IDENTITY = 0.3  # above it, proteins are near relatives (proteins/splits.py)


@dataclass(frozen=True)
class Split:
    """Sorted positions of the train and val proteins, and the number of clusters of near relatives."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    clusters: int


def plan_split(sequences: list[str], fraction: float, seed: int) -> Split:
    """Cluster the proteins and draw whole clusters for val. InputError when that is impossible."""
    labels = cluster(sequences, identity=IDENTITY)
    train, val = split(labels, [fraction], seed)
    return Split(train, val, int(labels.max()) + 1)


def write_split(store: EmbeddingStore, plan: Split, source: str, fraction: float, seed: int) -> tuple[Path, Path]:
    """Write embeddings_train.pt, embeddings_val.pt (n, d) and their provenance embeddings.json into the store's folder.

    Both matrices are in memory while this runs: 4 bytes per protein and feature in float32.
    """
    paths = store.path / "embeddings_train.pt", store.path / "embeddings_val.pt"
    rows = torch.cat(list(store.batches()))
    for path, positions in zip(paths, (plan.train, plan.val)):
        temporary = path.with_name(path.name + ".tmp")
        torch.save(rows[torch.from_numpy(positions)], temporary)
        os.replace(temporary, path)
    kept = ("model", "weights_sha256", "pool", "layers", "dtype", "compute", "long", "max_length", "proteins_sha256")
    record = {
        "source": source,
        **{key: store.provenance[key] for key in kept},
        "split": {"fraction": fraction, "identity": IDENTITY, "seed": seed, "clusters": plan.clusters},
        "n_train": len(plan.train),
        "n_val": len(plan.val),
    }
    write_json(store.path / "embeddings.json", record)
    return paths
