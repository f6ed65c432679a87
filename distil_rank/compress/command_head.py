"""Make a layer or a head smaller, fitted on embeddings, and say what was lost.

    distil-rank compress head head.safetensors --key dense --train x.pt --rank 64 --out small/
    distil-rank compress head head.onnx --metric whole --train x.pt --rank 64 --out small/
    distil-rank compress head head.pt --key head.0 head.2 --activation gelu --train x.pt \\
        --speedup 5 --out small/
    distil-rank compress head head.pt --key head --activation relu --train x.npy --labels y.npy \\
        --bytes 400k --int8 --out small/

The output folder has the weights (model.safetensors), certificate.json and a README that loads
them: `distil_rank.load("small/")` gives a torch module. Layers whose factors would not be smaller
stay dense. `--metric whole` makes the head one low-rank map, which often keeps more of it;
`--metric narrow` bends a few of that map's inner features, which keeps the most.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from distil_rank.compress.head_certificate import HeadCertificate, LayerCertificate
from distil_rank.compress.head_layers import Request
from distil_rank.compress.heads import compress_head, parts_of
from distil_rank.compress.storage import require_other_folder, save
from distil_rank.compress.tasks import Array, TaskChange, choose_metric, load_labels, task_change
from distil_rank.core.agreement import NAMES
from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError
from distil_rank.core.heads import load_head
from distil_rank.core.latency import compare_latency
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import (
    config_record,
    environment,
    require_writable,
    sha256,
    shown_path,
)
from distil_rank.core.tables import with_interval
from distil_rank.proteins.embedding_files import load_matrix, rows_in

BATCHES = (1, 32, 512)  # timed, teacher and student in turn on one thread


@dataclass(frozen=True)
class Config:
    head: tyro.conf.Positional[Path]  # .onnx, or a state dict (.safetensors, .pt)
    out: Path  # where to write
    train: Path | None = None  # embeddings to fit on (n, d)
    val: Path | None = None  # held-out embeddings (n, d)
    labels: Path | None = None  # one label a row of --val, else of --train: .npy, .npz, .pt, .csv
    key: tuple[str, ...] = ()  # names of the layers in order, or a common prefix
    # between the layers of a head
    activation: Literal["relu", "gelu", "tanh", "silu", "sigmoid", "identity"] | None = None
    rank: int | None = None  # rank of every layer
    fvu: float | None = None  # or: largest FVU of every layer on its own
    speedup: float | None = None  # or: FLOPs before / after
    bytes: str | None = None  # or: bytes of all weights after, such as 400k or 2M
    # fit each layer for its own output (so with --fvu) or the head's; or the whole head as one map,
    # or as one narrow layer
    metric: Literal["own", "output", "whole", "narrow"] | None = None
    prior: Path | None = None  # moments of other proteins, to blend in where they help
    int8: bool = False  # eight-bit weights
    held_out: float = 0.1  # share of the proteins kept aside
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one
    seed: int = 0  # of everything random


def run(config: Config) -> None:
    """Validate the request, compress, measure, write."""
    size = None if config.bytes is None else parse_bytes(config.bytes)
    Request(config.rank, config.fvu, config.speedup, size).check()
    require_other_folder(config.out, config.head)
    device = pick_device(config.device)
    loaded = load_head(config.head, config.key, config.activation)
    head: nn.Module = loaded.whole  # the small head scales its inputs too
    head = (head[0] if len(loaded.whole) == 1 else head).to(device)  # type: ignore[index]
    layers = [part for part in parts_of(head) if isinstance(part, nn.Linear)]
    train, held_out, labels = read_rows(config)
    assert config.train is not None
    if shared := int(rows_in(train, held_out).sum()):
        note = f"{shared} of {len(held_out)} held-out rows are also fitted on"
        print(f"note: {note}; figures on them say less", file=sys.stderr)
    if labels is not None:
        choose_metric(layers[-1].out_features, labels)
    prior = None
    if config.prior is not None:
        found = Moments.load(config.prior).state()
        prior = Moments.from_state({name: tensor.to(device) for name, tensor in found.items()})
    require_writable(config.out if config.out.exists() else config.out.absolute().parent)

    small, certificate = compress_head(
        *(head, train, held_out),
        rank=config.rank,
        fvu=config.fvu,
        speedup=config.speedup,
        bytes=size,
        metric=config.metric,
        prior=prior,
        int8=config.int8,
        seed=config.seed,
    )
    task, held_out = None, held_out.to(layers[0].weight)
    if labels is not None:
        with torch.no_grad():
            task = task_change(head(held_out), small(held_out), labels, config.seed)
    timed = [held_out[torch.arange(batch) % len(held_out)] for batch in BATCHES]
    record = certificate.record() | ({} if task is None else {"task": asdict(task)})
    record |= {
        "latency": compare_latency(head, small, timed, rounds=20),
        "config": config_record(config),
        "data": {
            "source": shown_path(config.train),
            "sha256": sha256(config.train),
            "n_train": len(train),
            "n_val": len(held_out),
            "shared_rows": shared,
        },
        "teacher": {"source": shown_path(config.head), "sha256": sha256(config.head)},
        "seeds": [config.seed],
        "environment": environment(device),
        "machine_dependent": ["latency", "environment"],
    }
    small = small.cpu()
    save(small, config.out, certificate=record, readme=readme(config, certificate))
    print(summary(certificate, task, config.out))


def read_rows(config: Config) -> tuple[Tensor, Tensor, Array | None]:
    """Rows to fit on and to measure on (--val, or a share of --train), and the latter's labels."""
    if config.train is None:
        raise InputError("--train required, embeddings to fit on, got none")
    data = load_matrix(config.train)
    held_out = None if config.val is None else load_matrix(config.val)
    rows = len(data if held_out is None else held_out)
    labels = None if config.labels is None else load_labels(config.labels, rows)
    if held_out is not None:
        return data, held_out, labels
    if not 0 < config.held_out < 1:
        raise InputError(f"--held-out must be between 0 and 1, got {config.held_out}")
    count = round(config.held_out * len(data))
    if min(count, len(data) - count) < 2:
        got = f"{len(data)} in all"
        raise InputError(
            f"at least 2 rows to fit and 2 to hold out required, got {got}; give more data"
        )
    order = torch.randperm(len(data), generator=generator(config.seed, "held-out rows"))
    labels = None if labels is None else labels[order[:count].numpy()]
    held_out, fitted = data[order[:count]], data[order[count:]]
    copies = rows_in(held_out, fitted)  # of one protein, which may not be on both sides
    return fitted[~copies], held_out, labels


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


def readme(config: Config, certificate: HeadCertificate) -> str:
    held = certificate.output_fvu["held_out"]
    what = " ".join([shown_path(config.head), *config.key])
    return f"""Compressed from {what} by Distil-Rank; FVU on held-out rows \
{held["value"]:.3g} [{held["low"]:.3g}, {held["high"]:.3g}] (see certificate.json).
```python
import distil_rank
y = distil_rank.load("{config.out.name}")(x)  # x (n, {certificate.layers[0].d_in}) float tensor
```
"""


def summary(certificate: HeadCertificate, task: TaskChange | None, out: Path) -> str:
    """What the terminal shows at the end."""
    held = certificate.output_fvu["held_out"]
    texts = [f"{NAMES[m]} {with_interval(v, '.3f')}" for m, v in certificate.kept.items()]
    kept = ", ".join(texts) or "not measured on so few rows"
    lines = [f"kept of the function: {kept}", *map(_layer_line, certificate.layers)]
    lines.append(
        f"output FVU {held['value']:.4g} [{held['low']:.4g}, {held['high']:.4g}]"
        f" on {certificate.held_out_rows} held-out rows; FLOPs / {certificate.flops_ratio:.3g};"
        f" bytes {certificate.bytes_before} -> {certificate.bytes_after}"
    )
    if task is not None:
        change = task.change
        lines.append(
            f"{task.metric} {task.before['value']:.4f} -> {task.after['value']:.4f},"
            f" change {change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]"
            f" on {task.rows} rows"
        )
    return "\n".join([*lines, f"written to {out}"])


def _layer_line(layer: LayerCertificate) -> str:
    shape = f"  layer {layer.name}  {layer.d_in} -> {layer.d_out}  "
    if layer.rank is None:
        return f"{shape}{layer.note}"
    floor = layer.held_out_floor_fvu
    beside = "" if floor is None else f" (floor {floor:.4g})"
    return f"{shape}rank {layer.rank}  held-out FVU {layer.held_out_achieved_fvu:.4g}{beside}"
