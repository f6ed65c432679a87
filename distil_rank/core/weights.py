"""Tensors, state dicts and linear layers from files. Nothing is unpickled beyond tensors."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.linear import linear

SUFFIXES = (".pt", ".bin", ".npy", ".npz", ".safetensors")


def read_tensors(path: str | Path, key: str = "X") -> object:
    """What a file ending in one of `SUFFIXES` holds: a tensor, or a dict of them.

    A pickle that is more than tensors is refused, never executed. Of an .npz with several arrays
    only `key` is read.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"a file ending in {', '.join(SUFFIXES)} required, got {path}")
    if not path.is_file():
        raise InputError(f"an existing file required, got {path}; check the path")
    try:
        if path.suffix in (".pt", ".bin"):
            return torch.load(path, map_location="cpu", weights_only=True)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return torch.from_numpy(loaded)
        with loaded:
            names = [key] if key in loaded.files else loaded.files
            if len(names) != 1:
                got = ", ".join(names) or "none"
                raise InputError(
                    f"one array, or one named {key}, required in {path}, got {got};"
                    f" save the matrix as {key}"
                )
            return {names[0]: torch.from_numpy(loaded[names[0]])}
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"plain tensors required in {path}, got a pickle, which was not executed:"
            f" {str(error).splitlines()[0]}"
        ) from None
    except Exception as error:  # bytes of another kind fail in any way: text even with a KeyError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"a readable {path.suffix} file required, got {path}: {reason}") from None


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Named tensors of a .pt, .bin or .safetensors file; inner dicts ("model", ...) are flat."""
    path = Path(path)
    if path.suffix not in (".pt", ".bin", ".safetensors"):
        raise InputError(f"tensors in a .pt or .safetensors file required, got {path}")
    loaded = read_tensors(path)
    if not isinstance(loaded, dict):
        got = type(loaded).__name__
        raise InputError(f"a state dict with weight and bias required in {path}, got {got}")
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        elif isinstance(value, dict):
            tensors |= {f"{name}.{k}": v for k, v in value.items() if isinstance(v, Tensor)}
    return tensors


def layer_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names that have a `.weight`, in the file's order; "" where the tensor is plain `weight`."""
    return [x.removesuffix("weight").rstrip(".") for x in tensors if x.split(".")[-1] == "weight"]


def layer_of(tensors: Mapping[str, Tensor], name: str, path: str | Path) -> nn.Linear:
    """The layer `name` of a state dict, frozen, in float32 (float64 stays); InputError."""
    prefix = f"{name}." if name else ""
    weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
    if weight is None:
        layers = ", ".join(layer_names(tensors)) or "none"
        raise InputError(
            f"key {name!r} required in {path}, which has layers {layers}; choose one with --key"
        )
    if weight.ndim != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {tuple(weight.shape)} for {name!r} in {path}"
        raise InputError(f"a floating-point weight (d_out, d_in) required, got {got}")
    if bias is not None and bias.shape != weight.shape[:1]:
        got = f"{tuple(bias.shape)} for {name!r} in {path}"
        raise InputError(f"a bias ({len(weight)},) required beside that weight, got {got}")
    if not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
        got = f"NaN or infinity in {name!r} of {path}"
        raise InputError(f"a finite weight and bias required, got {got}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return linear(weight.to(dtype), None if bias is None else bias.to(dtype))
