"""A head from a state dict, and a head as ONNX."""

from __future__ import annotations

import logging
import re
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from distil_rank.compress.storage import ACTIVATIONS
from distil_rank.core.errors import InputError
from distil_rank.core.records import atomic
from distil_rank.core.weights import layer_names, layer_of, read_state_dict


def load_head(
    path: Path, keys: tuple[str, ...], activation: str | None
) -> nn.Linear | nn.Sequential:
    """The layers named by `keys` (or under one prefix) of a state dict, `activation` between them.

    InputError where one is no linear layer, or they do not fit together.
    """
    tensors = read_state_dict(path)
    names = layer_names(tensors)
    chosen: list[str] = []
    for key in keys or ("",):
        key = key.removesuffix(".weight")
        under = [x for x in names if not key or x.startswith(f"{key}.")]
        # a key that names nothing is refused by layer_of
        chosen += [key] if key in names or not under else sorted(under, key=_natural)
    layers = [layer_of(tensors, name, path) for name in chosen]
    for (a, first), (b, second) in pairwise(zip(chosen, layers)):
        if first.out_features != second.in_features:
            raise InputError(
                f"layers that fit together required, {a!r} has {first.out_features} outputs and"
                f" {b!r} reads {second.in_features} features; name them in order with --key"
            )
    if len(layers) == 1:
        return layers[0]
    if activation is None:
        raise InputError(
            f"an activation between the {len(layers)} layers {', '.join(chosen)} required;"
            " say --activation relu"
        )
    parts: list[nn.Module] = [layers[0]]
    for layer in layers[1:]:
        parts += [ACTIVATIONS[activation](), layer]
    return nn.Sequential(*parts).eval()


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorting key in which layer 10 follows layer 2."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"[.]", name)]


def export_onnx(module: nn.Module, x: Tensor, path: Path) -> None:
    """Write the module as ONNX with a free batch axis."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), atomic(path) as temporary:
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                (x,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("rows", min=1)},),
                input_names=["x"],
                output_names=["y"],
                verbose=False,
            )
            assert program is not None
            program.save(temporary, external_data=False)
    except ImportError as error:
        raise InputError(
            f"the packages onnx and onnxscript required for --onnx, got: {error};"
            " pip install onnx onnxscript"
        ) from None
