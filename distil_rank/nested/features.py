"""Raw embeddings that the probe needs, by model and protein, computed once and kept on disk so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distil_rank.nested.representations import hidden_names
from distil_rank.nested.stores import Loader
from distil_rank.proteins.pooling import embed

POOLS = ("mean", "site")


def raw_features(
    name: str,
    sequences: Sequence[str],
    positions: Sequence[Sequence[int]] | None,
    loaders: Sequence[Loader],
    layers: Sequence[int],
    folder: Path,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Tensor]]:
    """By pool, raw embeddings (n, k) of every size, and the hidden `layers` of the largest as `SIZE@LAYER`.

    `mean` is over all residues, `site` over the given positions of each sequence (absent without positions).
    """
    found: dict[str, dict[str, Tensor]] = {pool: {} for pool in (POOLS if positions is not None else POOLS[:1])}
    for loader in loaders:
        chosen = tuple(layers) if loader is loaders[-1] and layers else (-1,)
        inputs = [list(sequences), [list(p) for p in positions or ()], chosen, loader.weights()]
        identity = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
        path = folder / f"{name}.{loader.size}.{identity}.safetensors"
        if not path.exists():
            tensors = pooled(loader, sequences, positions, chosen, device)
            temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
            save_file(tensors, temporary)
            os.replace(temporary, path)
        for pool, by_layer in load_file(path).items():
            found[pool][loader.size] = by_layer[-1]  # the last layer is always among them, last
            if len(chosen) > 1:
                found[pool] |= dict(zip(hidden_names(loader.size, chosen), by_layer))
    return found


def pooled(
    loader: Loader,
    sequences: Sequence[str],
    positions: Sequence[Sequence[int]] | None,
    layers: Sequence[int],
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Vectors (layers, n, d) by pool."""
    model = loader.load(device).model
    shape = (len(layers), len(sequences), model.width)
    result = {pool: torch.empty(shape) for pool in (POOLS if positions is not None else POOLS[:1])}
    for i, vectors in embed(model, sequences, "residues", layers):
        result["mean"][:, i] = vectors.mean(1)
        if positions is not None:
            result["site"][:, i] = vectors[:, list(positions[i])].mean(1)
    return result
