"""A head as ONNX."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.records import atomic


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
