"""Make a layer, a head or a whole protein language model smaller, and say what was lost.

A layer or a head (a state dict in .safetensors or .pt), fitted on embeddings:

    distil-rank compress head.safetensors --key classifier.dense --data embeddings.pt --rank 64 --out small/
    distil-rank compress head.pt --key head.0 head.2 --activation gelu --data embeddings.pt --speedup 5 --out small/
    distil-rank compress head.pt --key head --activation relu --data x.npy --labels y.npy --bytes 400k --int8 --onnx --out small/

A model (nano-64, esm2_t6_8M_UR50D, a fair-esm .pt, a Hugging Face ESM-2 or GPT-2 folder), fitted on proteins:

    distil-rank compress nano-64 --calibration proteins.fasta --ratio 0.5 --out small/
    distil-rank compress gpt2_folder/ --calibration proteins.fasta --ratio 0.5 --sequential --recover 300 --merge --out small/

The output folder has the weights (model.safetensors), certificate.json and a README that loads them; models also get
report.json and report.png. `distil_rank.load("small/")` gives a torch module. Layers whose factors would not be smaller stay
dense.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from distil_rank.core.errors import InputError


@dataclass(frozen=True)
class Config:
    target: tyro.conf.Positional[
        str
    ]  # state dict of a layer or head, or a model (name, .pt checkpoint, Hugging Face folder)
    out: Path = Path("small")  # folder to write

    key: tuple[str, ...] = ()  # layer or layers: names in the state dict, in order, or one common prefix
    activation: Literal["relu", "gelu", "tanh", "silu", "sigmoid", "identity"] | None = (
        None  # between the layers of a head
    )
    data: Path | None = None  # inputs of the layer or head: .pt, .npy, .npz (key X), .safetensors
    val: Path | None = None  # held-out inputs; without them a share of the data is held out
    labels: Path | None = (
        None  # one label a row of data: .npy, .npz (key y), .pt, .csv; gives AUROC, accuracy or Spearman
    )
    val_labels: Path | None = None  # one label a row of --val
    rank: int | None = None  # rank of every layer
    fvu: float | None = None  # or: largest fraction of variance unexplained of every layer on its own
    speedup: float | None = None  # or: FLOPs before / after
    bytes: str | None = None  # or: bytes of all weights after, such as 400k or 2M
    metric: Literal["own", "next", "output"] | None = (
        None  # fit each layer for its own output (so with --fvu), the next linear layer's, or the head's (else)
    )
    onnx: bool = False  # also write model.onnx (layer or head)

    calibration: Path | None = None  # FASTA to fit a model on
    evaluation: Path | None = (
        None  # FASTA to measure a model on; without it a share of the calibration proteins is held out
    )
    ratio: float | None = None  # parameters of the chosen layers after / before
    method: Literal["budget", "energy", "uniform"] = "budget"  # how ranks are shared out among the layers
    unit: Literal["parameters", "flops"] = "parameters"  # what --ratio counts
    sensitivity: bool = False  # weigh layers by the gradient of the model's own loss
    sequential: bool = False  # fit each block on what the compressed blocks before it put out
    include: tuple[str, ...] = ("*",)  # name patterns of the layers to compress
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone
    recover: int = 0  # steps of distillation of the factors afterwards
    dms: Path | None = None  # folder of mutation assays (NAME.csv with NAME.fasta): Spearman before and after
    merge: bool = False  # also write merged/, a dense Hugging Face checkpoint that runs without this package
    max_residues: int = 1022  # longer proteins are cut off
    moments_out: Path | None = None  # also write the model's moments, to be somebody's --prior

    prior: Path | None = None  # moments of other proteins (from `distil-rank moments`, or --moments-out for a model)
    int8: bool = False  # eight-bit factors
    held_out: float = 0.2  # share of the data or proteins that is only measured on
    seed: int = 0  # of the held-out rows, the intervals and the recovery


def run(config: Config) -> None:
    """Validate the request, then compress a head (--data) or a model (--calibration)."""
    if (config.data is None) == (config.calibration is None):
        raise InputError(
            "--data (a layer or head) or --calibration (a model) required, got "
            + ("both" if config.data else "neither")
        )
    if not 0 < config.held_out < 1:
        raise InputError(f"--held-out must be between 0 and 1, got {config.held_out}")
    if config.data is not None:
        from distil_rank.compress.compress_head import run_head

        run_head(config)
    else:
        from distil_rank.compress.compress_model import run_model

        run_model(config)


def parse_bytes(text: str) -> int:
    """400k, 2M, 1.5MB, 120000 -> bytes (powers of 1000)."""
    number = text.strip().lower().removesuffix("b")
    scale = {"k": 1000, "m": 1000_000, "g": 1000_000_000}.get(number[-1:], 1)
    try:
        value = float(number.rstrip("kmg")) * scale
    except ValueError:
        value = 0
    if not 1 <= value < 1e15:
        raise InputError(f"a number of bytes such as 400k or 2M required, got {text!r}")
    return int(value)


def unused(config: Config, names: tuple[str, ...], instead: str) -> None:
    """InputError when flags of the other mode were given: nothing is ignored in silence."""
    defaults = {f: Config.__dataclass_fields__[f].default for f in names}
    given = [f"--{name.replace('_', '-')}" for name, default in defaults.items() if getattr(config, name) != default]
    if given:
        raise InputError(f"{', '.join(given)} cannot be used {instead}; leave out")
