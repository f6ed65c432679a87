"""Compressed modules on disk: a folder with weights (safetensors), what to rebuild (JSON), certificate and a short README.

    model = distil_rank.load("small/")

Bit-equal to what was saved; nothing is unpickled. A module whose class is not known here is loaded into a dense instance of it:
`load("small/", model=MyModel())`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.compress.architectures import Architecture, copy_tokenizer
from distil_rank.core.lowrank import LowRankLinear
from distil_rank.compress.quantise import Int8LowRank
from distil_rank.compress.sites import is_linear
from distil_rank.core.records import read_json

SCHEMA = "distil-rank/compressed/1"
WEIGHTS, DESCRIPTION, CERTIFICATE, README = "model.safetensors", "compressed.json", "certificate.json", "README.md"
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "layernorm": nn.LayerNorm,
}


def save(
    module: nn.Module,
    folder: str | Path,
    architecture: Architecture | None = None,
    certificate: Mapping[str, Any] | None = None,
    readme: str = "",
) -> None:
    """Write a compressed layer, head or model. The folder appears whole or not at all; an earlier one is replaced by it."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    description = {"schema": SCHEMA, **describe_module(module, architecture), "factors": factors(module)}
    tensors, description["tied"] = untied(module.state_dict())
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / WEIGHTS)
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        if certificate is not None:
            (temporary / CERTIFICATE).write_text(json.dumps(certificate, indent=1, allow_nan=False) + "\n")
        if readme:
            (temporary / README).write_text(readme)
        if architecture is not None:
            copy_tokenizer(architecture.source, temporary)
        replace_folder(temporary, folder)
    except OSError as error:
        raise InputError(f"a writable folder required, got {folder} ({error.strerror}); choose another") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Put a finished folder in place; files of ours in an earlier one are replaced, anything else in it is left alone."""
    if not folder.exists():
        new.rename(folder)
        return
    for file in sorted(
        new.iterdir(), key=lambda f: f.name == DESCRIPTION
    ):  # the description last: it makes the rest valid
        os.replace(file, folder / file.name)


def describe_module(module: nn.Module, architecture: Architecture | None) -> dict[str, Any]:
    if architecture is not None:
        return {"kind": architecture.kind, "class": architecture.class_name, "config": architecture.config}
    if isinstance(module, LowRankLinear | Int8LowRank) or type(module) is nn.Linear:
        return {"kind": "head", "modules": [_head_part(module)], "single": True}
    if type(module) is nn.Sequential:
        return {"kind": "head", "modules": [_head_part(part) for part in module], "single": False}
    return {"kind": "module", "class": type(module).__name__}


def _head_part(part: nn.Module) -> dict[str, Any]:
    if isinstance(part, LowRankLinear | Int8LowRank):
        return {"type": "factors"}
    if type(part) is nn.Linear:
        return {"type": "linear", "d_in": part.in_features, "d_out": part.out_features, "bias": part.bias is not None}
    for name, cls in ACTIVATIONS.items():
        if type(part) is cls:
            if isinstance(part, nn.LayerNorm):
                return {
                    "type": name,
                    "shape": list(part.normalized_shape),
                    "eps": part.eps,
                    "bias": part.bias is not None,
                }
            if isinstance(part, nn.GELU):
                return {"type": name, "approximate": part.approximate}
            return {"type": name, "p": part.p} if isinstance(part, nn.Dropout) else {"type": name}
    raise InputError(f"a head of nn.Linear and {', '.join(ACTIVATIONS)} required, got {type(part).__name__}")


def factors(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Shapes of all low-rank layers by name."""
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, LowRankLinear):
            shape = {"d_in": part.A.in_features, "d_out": part.B.out_features, "rank": part.rank}
            found[name] = {"type": "low-rank", **shape, "bias": part.B.bias is not None}
        elif isinstance(part, Int8LowRank):
            shape = {"d_in": part.A.shape[1], "d_out": part.B.shape[0], "rank": part.rank}
            found[name] = {"type": "int8", **shape, "bias": part.bias is not None}
    return found


def untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, each stored once, and alias -> name for those that share memory."""
    seen: dict[tuple[int, torch.Size], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach().contiguous()
    return tensors, aliases


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The module saved in a folder, in evaluation mode; `model` is a dense instance where its class is not known here."""
    folder = Path(path)
    description = read_json(folder / DESCRIPTION, SCHEMA)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"a readable {WEIGHTS} required in {folder}, got: {error}") from None
    tensors |= {alias: tensors[name] for alias, name in description["tied"].items()}
    kind = description["kind"]
    if kind == "head":
        module: nn.Module = _build_head(description)
    elif kind in ("fair-esm", "transformers"):
        module = Architecture(kind, description["class"], description["config"]).build()
    elif model is None:
        raise InputError(f"a dense {description['class']} required to load {folder}; call load(path, model=...)")
    else:
        module = copy.deepcopy(model)
    for name, shape in description["factors"].items():
        empty = _empty_factors(shape, tensors, name)
        if name:
            module.set_submodule(name, empty)
        else:
            module = empty
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"weights of this {kind} required in {folder}, got others: {str(error).splitlines()[-1]}"
        ) from None
    if hasattr(module, "tie_weights"):
        cast(Any, module).tie_weights()
    for alias, name in description["tied"].items():
        _tie(module, alias, name)
    return module.eval().requires_grad_(False)


def _tie(module: nn.Module, alias: str, name: str) -> None:
    """Make two names one parameter again."""
    owner, _, attribute = name.rpartition(".")
    shared = getattr(module.get_submodule(owner), attribute)
    owner, _, attribute = alias.rpartition(".")
    setattr(module.get_submodule(owner), attribute, shared)


def _empty_factors(shape: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> nn.Module:
    d_in, d_out, rank = shape["d_in"], shape["d_out"], shape["rank"]
    if shape["type"] == "int8":
        return Int8LowRank.empty(d_in, d_out, rank, shape["bias"])
    bias = torch.zeros(d_out) if shape["bias"] else None
    return LowRankLinear(torch.zeros(rank, d_in), torch.zeros(d_out, rank), bias)


def _build_head(description: Mapping[str, Any]) -> nn.Module:
    parts: list[nn.Module] = []
    for part in description["modules"]:
        kind = part["type"]
        if kind == "linear":
            parts.append(nn.utils.skip_init(nn.Linear, part["d_in"], part["d_out"], bias=part["bias"]))
        elif kind == "factors":
            parts.append(nn.Identity())  # put in place below, with the other factors
        elif kind == "layernorm":
            parts.append(nn.LayerNorm(part["shape"], eps=part["eps"], bias=part["bias"]))
        else:
            parts.append(ACTIVATIONS[kind](**{k: v for k, v in part.items() if k != "type"}))
    return parts[0] if description["single"] else nn.Sequential(*parts)


def merged(module: nn.Module, dense: nn.Module) -> nn.Module:
    """A copy of the dense model that holds W = B A and the students' biases: the compressed function in dense form."""
    small = dict(module.named_modules())
    result = copy.deepcopy(dense)
    layers = dict(result.named_modules())
    state = {k: v for k, v in module.state_dict().items() if k in result.state_dict()}
    result.load_state_dict(state, strict=False)
    for name, part in small.items():
        if not isinstance(part, LowRankLinear | Int8LowRank):
            continue
        layer = layers[name]
        assert is_linear(layer)
        weight, bias = dense_weight(part)
        if layer.bias is None:
            raise InputError(
                f"a layer with bias required for a dense export, {name} has none; keep the factors instead"
            )
        with torch.no_grad():
            layer.weight.copy_(weight if isinstance(layer, nn.Linear) else weight.T)
            layer.bias.copy_(bias if bias is not None else torch.zeros_like(layer.bias))
    return result


def dense_weight(part: LowRankLinear | Int8LowRank) -> tuple[Tensor, Tensor | None]:
    """W = B A (d_out, d_in) and the bias of a low-rank layer, multiplied in float64."""
    if isinstance(part, Int8LowRank):
        A, B, bias = part.factors()
    else:
        A, B = part.A.weight.detach(), part.B.weight.detach()
        bias = None if part.B.bias is None else part.B.bias.detach()
    return B.double() @ A.double(), None if bias is None else bias.detach()


def save_merged(module: nn.Module, architecture: Architecture, folder: str | Path) -> None:
    """Write a dense-compatible Hugging Face checkpoint of a compressed transformers model; anyone can load it."""
    if architecture.kind != "transformers":
        raise InputError(
            "a Hugging Face model required for a dense export, got fair-esm's ESM2; load the folder instead"
        )
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    try:
        cast(Any, merged(module, architecture.build())).save_pretrained(temporary)
        copy_tokenizer(architecture.source, temporary)
        if folder.exists():
            for file in temporary.iterdir():
                os.replace(file, folder / file.name)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
