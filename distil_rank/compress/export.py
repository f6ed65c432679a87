"""A compressed model for those who do not have this package: dense weights, or ONNX."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distil_rank.compress.architectures import Architecture, describe
from distil_rank.compress.dense_models import quiet_transformers
from distil_rank.compress.hugging_face import as_transformers, tokenizer_files
from distil_rank.compress.storage import SMALL
from distil_rank.core.errors import InputError
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.records import atomic
from distil_rank.proteins.esm2 import ESM2


def merged(module: nn.Module, dense: nn.Module) -> nn.Module:
    """A copy of the dense model with W = B A and the students' biases: the compressed function.

    Neurons that are gone come back as zeros.
    """
    result = copy.deepcopy(dense)
    known, found = result.state_dict(), module.state_dict()
    same = {k: v for k, v in found.items() if k in known and known[k].shape == v.shape}
    result.load_state_dict(same, strict=False)
    factored = {name for name, part in module.named_modules() if isinstance(part, LowRankLinear)}
    for name, part in module.named_modules():
        if not isinstance(part, tuple(SMALL.values())) or name[:-2] in factored:
            continue
        layer: Any = result.get_submodule(name)
        weight, bias = cast(Any, part).weight.double(), cast(Any, part).bias
        if layer.bias is None and bias is not None:
            raise InputError(
                f"a layer with bias required for a dense export, {name} has none;"
                " keep the factors instead"
            )
        with torch.no_grad():
            whole = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
            whole.zero_()[: len(weight), : weight.shape[1]] = weight
            if bias is not None:
                layer.bias.zero_()[: len(bias)] = bias
    return result


def save_merged(module: nn.Module, architecture: Architecture, folder: str | Path) -> None:
    """Write a dense Hugging Face checkpoint of a compressed model: runs anywhere."""
    module, architecture = _of_transformers(module, architecture)
    with quiet_transformers(), atomic(folder) as temporary:
        cast(Any, merged(module, architecture.build())).save_pretrained(temporary)
        for name, content in tokenizer_files(architecture.source, architecture.is_esm).items():
            (temporary / name).write_bytes(content)


def _of_transformers(
    module: nn.Module, architecture: Architecture
) -> tuple[nn.Module, Architecture]:
    if architecture.kind == "transformers":
        return module, architecture
    module = as_transformers(cast(ESM2, module))
    return module, cast(Architecture, describe(module))


class _Read(nn.Module):
    """Token ids and attention mask (B, T) to hidden states and, of a model with a head, logits."""

    def __init__(self, module: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.module, self.architecture = module, architecture

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        found = self.architecture.read(self.module, batch)
        return tuple(x for x in found if x is not None)


def save_onnx(
    module: nn.Module, architecture: Architecture, sequences: Sequence[str], path: Path
) -> None:
    """Write a model as ONNX with free batch and length, traced on these proteins.

    Inputs input_ids and attention_mask, outputs hidden and, of a model with a head, logits.
    """
    module, architecture = _of_transformers(module, architecture)
    batch = architecture.tokenise(sequences)
    free = {
        name: {0: "proteins", 1: "tokens"} for name in ("input_ids", "attention_mask", "hidden")
    }
    free["logits"] = {0: "proteins"} | ({} if architecture.task == "protein" else {1: "tokens"})
    names = ["input_ids", "attention_mask"]
    try:
        with warnings.catch_warnings(), atomic(path) as temporary:
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Read(module, architecture).eval(),
                (batch["input_ids"], batch["attention_mask"]),
                temporary,
                dynamo=False,  # a twentieth of the time, and the same graph
                opset_version=17,
                input_names=names,
                output_names=["hidden", "logits"][: 1 + (architecture.task != "hidden")],
                dynamic_axes=free,
            )
    except ImportError as error:
        raise InputError(
            f"the package onnx required for --onnx, got: {error}; pip install onnx"
        ) from None
