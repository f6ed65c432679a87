"""Embedding matrices (n proteins, d features) in files: read, or written from a store in parts.

Formats: .pt, .npy, .npz (key X) and .safetensors.
"""

from pathlib import Path

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, atomic, read_json, write_json, write_text
from distil_rank.core.weights import read_tensors
from distil_rank.proteins.splits import Split
from distil_rank.proteins.store import EmbeddingStore


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
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        got = f"got shape {tuple(x.shape)}; pool residues"
        raise InputError(f"at least 2 rows (proteins, features) required in {path}, {got}")
    if bad := int((~x.isfinite()).any(1).sum()):
        got = f"NaN or infinity in {bad} of {len(x)} rows; remove them"
        raise InputError(f"finite values required in {path}, got {got}")
    return x if x.dtype == torch.float64 else x.float()


def rows_in(x: Tensor, others: Tensor) -> Tensor:
    """Which rows of `others` (n, d) are also rows of `x`: a mask (n,)."""
    known = {hash(row.tobytes()) for row in x.numpy()}
    found = [hash(row.tobytes()) in known for row in others.numpy()]
    return torch.tensor(found, dtype=torch.bool)


def provenance(path: str | Path) -> Record:
    """What `embeddings.json` beside a matrix says of it (model, source, ...); empty without one."""
    card = Path(path).parent / "embeddings.json"
    return read_json(card) if card.exists() else {}


def write_split(
    store: EmbeddingStore, plan: Split, source: str, drawn: Record
) -> tuple[Path, Path]:
    """Write embeddings_{train,val}.pt (n, d) and embeddings.json into the store's folder.

    embeddings_{train,val}.txt name the protein of each row. Both matrices are in memory while this
    runs: 4 bytes per protein and feature in float32.
    """
    paths = store.path / "embeddings_train.pt", store.path / "embeddings_val.pt"
    rows, ids = torch.cat(list(store.batches())), store.ids
    for path, positions in zip(paths, plan.parts):
        # torch.save writes the name of a path, here that of a process, into the file
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.save(rows[torch.from_numpy(positions)], file)
        write_text(path.with_suffix(".txt"), "".join(f"{ids[i]}\n" for i in positions))
    model = ("model", "weights_sha256", "pool", "layers", "dtype", "compute", "long", "max_length")
    record = {
        "source": source,
        **{key: store.provenance[key] for key in (*model, "proteins_sha256")},
        "split": {**drawn, "clusters": plan.clusters, **plan.method},
        "n_train": len(plan.parts[0]),
        "n_val": len(plan.parts[1]),
    }
    write_json(store.path / "embeddings.json", record)
    return paths
