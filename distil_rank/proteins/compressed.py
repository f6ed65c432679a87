"""Models that `distil-rank compress model` wrote, read without the code that compresses."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, read_json
from distil_rank.proteins import hugging_face

# of `compress.storage`
DESCRIPTION, WEIGHTS, SCHEMA = "compressed.json", "model.safetensors", "distil-rank/compressed/1"
_SETTINGS = {"layers", "width", "heads", "token_dropout", "eps", "head"}


def read(folder: Path) -> tuple[Record, list[tuple[str, Tensor]], dict[str, Record]]:
    """Settings of the ESM2, its tensors and its low-rank layers (shapes) by fair-esm's names.

    Eight-bit factors become floating-point ones: the same function up to rounding.
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
        config = hugging_face.settings(config, path)
    else:
        raise InputError(
            f"a compressed ESM-2 required, got a {kind} in {folder}; use distil_rank.load"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"a readable {WEIGHTS} required in {folder}, got: {error}") from None
    tensors |= {alias: tensors[name] for alias, name in description["tied"].items()}
    for name, shape in description["factors"].items():
        if shape["type"] not in ("low-rank", "int8"):
            got = f"{name} of type {shape['type']} in {folder}; use distil_rank.load"
            raise InputError(f"low-rank layers, float or int8, required, got {got}")
        tensors.pop(f"{name}.inner_mean", None)  # of use to whoever truncates
        if shape["type"] == "int8":
            _dequantise(tensors, name)
    named = [(_named(key, kind), tensor) for key, tensor in tensors.items()]
    factors = {_named(f"{name}.", kind)[:-1]: x for name, x in description["factors"].items()}
    return config, named, factors


def _named(key: str, kind: str) -> str:
    return key if kind == "esm2" else hugging_face.fair_esm_key(key)


def _dequantise(tensors: dict[str, Tensor], name: str) -> None:
    """int8 A (r, d_in) and B (d_out, r) times the scales of their rows."""
    for factor in ("A", "B"):
        integers = tensors.pop(f"{name}.{factor}")
        scale = tensors.pop(f"{name}.{factor}_scale")
        tensors[f"{name}.{factor}.weight"] = integers.float() * scale.float()[:, None]
    if f"{name}.bias" in tensors:
        tensors[f"{name}.B.bias"] = tensors.pop(f"{name}.bias")
