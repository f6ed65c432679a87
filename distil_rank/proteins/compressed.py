"""What `distil-rank compress model` writes, and its ESM-2 read without the code that compresses."""

from pathlib import Path

from torch import Tensor, stack

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
            _unpack(tensors, name, shape)
    named = [(fair_esm_key(key), tensor) for key, tensor in tensors.items()]
    return config, named, {fair_esm_key(f"{name}.")[:-1]: x for name, x in factors.items()}


def _unpack(tensors: dict[str, Tensor], name: str, shape: Record) -> None:
    """Weight (d_out, d_in): bytes times a scale a row, or half bytes a row and GROUP columns."""
    try:
        integers, scale = tensors.pop(f"{name}.packed"), tensors.pop(f"{name}.scale").float()
    except KeyError as key:
        raise InputError(f"the tensor {key} required in {WEIGHTS}, got none") from None
    if shape["bits"] == 8:
        tensors[f"{name}.weight"] = integers.float() * scale[:, None]
        return
    halves = stack([integers % 16, integers // 16], -1).flatten(1)[:, : shape["d_in"]]
    scales = scale.repeat_interleave(GROUP, 1)[:, : shape["d_in"]]
    tensors[f"{name}.weight"] = (halves.float() - 8) * scales
