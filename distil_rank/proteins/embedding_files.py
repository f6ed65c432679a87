"""Embedding matrices (n proteins, d features) from files: .pt, .npy, .npz (key X) and .safetensors."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.weights import read_tensors


def load_matrix(path: str | Path) -> Tensor:
    """Embeddings (n, d), n >= 2, in float32 (float64 stays float64); InputError says what is wrong.

    Of a file with several named tensors, the one named X is taken.
    """
    x = read_tensors(path)
    if isinstance(x, dict):
        if "X" not in x and len(x) != 1:
            raise InputError(f"one tensor, or one named X, required in {path}, got {sorted(map(str, x))}")
        x = x.get("X", next(iter(x.values())))
    if not isinstance(x, Tensor):
        raise InputError(f"a tensor (n, d) required in {path}, got {type(x).__name__}; save the matrix alone")
    if not x.is_floating_point():
        raise InputError(f"floating-point embeddings required in {path}, got {x.dtype}; convert them before saving")
    if x.ndim != 2:
        raise InputError(
            f"2 axes (proteins, features) required in {path}, got shape {tuple(x.shape)}; pool residues first"
        )
    if len(x) < 2 or x.shape[1] < 1:
        raise InputError(f"at least 2 rows of 1 feature required in {path}, got shape {tuple(x.shape)}")
    bad = int((~x.isfinite()).any(1).sum())
    if bad:
        raise InputError(
            f"finite values required in {path}, got NaN or infinity in {bad} of {len(x)} rows; remove them"
        )
    return x if x.dtype == torch.float64 else x.float()


def provenance(path: str | Path) -> dict[str, Any]:
    """What `embeddings.json` beside a matrix says of it (model, source, ...); empty without one."""
    card = Path(path).parent / "embeddings.json"
    try:
        known = json.loads(card.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"a JSON object required in {card}, got {error}; mend it or remove it") from None
    return known if isinstance(known, dict) else {}
