"""What `distil-rank compress model` writes, and its ESM-2 read without the code that compresses."""

from pathlib import Path

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, read_json
from distil_rank.core.weights import read_state_dict
from distil_rank.proteins.hugging_face import fair_esm_key, settings

DESCRIPTION, WEIGHTS, SCHEMA = "compressed.json", "model.safetensors", "distil-rank/compressed/1"
GROUP = 64  # columns with one scale, in four bits
_SETTINGS = {"layers", "width", "heads", "token_dropout", "eps", "head"}


def read(folder: Path) -> tuple[Record, list[tuple[str, Tensor]], dict[str, Record]]:
    """Settings of the ESM2, its tensors and its smaller layers (shapes) by fair-esm's names.

    Weights in eight or four bits become floating-point ones: the same function up to rounding.
    """
    path = folder / DESCRIPTION
    description = read_json(path, SCHEMA)
    kind, config = description["kind"], dict(description.get("config", {}))
    if kind == "esm2":
        if config.keys() != _SETTINGS:
            got = ", ".join(sorted(config.keys() ^ _SETTINGS))
            raise InputError(f"the settings of an ESM-2 required in {path}, wrong are: {got}")
        del config["head"]
    elif kind == "transformers":
        config.pop("distil_rank_pooler", None)
        config = settings(config, path)
    else:
        raise InputError(
            f"a compressed ESM-2 required, got a {kind} in {folder}; use distil_rank.load"
        )
    tensors, factors = read_state_dict(folder / WEIGHTS), description["factors"]
    tensors |= {alias: tensors[name] for alias, name in description["tied"].items()}
    for name, shape in factors.items():
        tensors.pop(f"{name}.inner_mean", None)  # of use to whoever truncates
        if shape["type"] == "linear":
            try:
                parts = tensors.pop(f"{name}.packed"), tensors.pop(f"{name}.scale")
            except KeyError as key:
                raise InputError(f"the tensor {key} required in {WEIGHTS}, got none") from None
            tensors[f"{name}.weight"] = unpacked(*parts, shape["d_in"])
    named = [(fair_esm_key(key), tensor) for key, tensor in tensors.items()]
    return config, named, {fair_esm_key(f"{name}.")[:-1]: x for name, x in factors.items()}


def unpacked(
    packed: Tensor, scale: Tensor, d_in: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weight (d_out, d_in) of bytes and a scale a row, or half bytes and one for GROUP columns."""
    integers, scale = packed.to(dtype), scale.to(dtype)
    if packed.dtype == torch.int8:
        return integers * scale[:, None]
    high = (integers / 16).floor()
    integers = torch.stack([integers - 16 * high, high], -1).flatten(1)[:, :d_in] - 8
    return integers * scale.repeat_interleave(GROUP, 1)[:, :d_in]
