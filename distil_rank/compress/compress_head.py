"""`distil-rank compress` for a layer or a head: state dict and embeddings in, folder out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.compress.compress import Config, parse_bytes, unused
from distil_rank.compress.head_plan import Request
from distil_rank.compress.heads import check_rows, compress_head
from distil_rank.core.latency import compare_latency
from distil_rank.compress.storage import ACTIVATIONS, save
from distil_rank.compress.tasks import choose_metric, load_labels, task_change
from distil_rank.experiment.teachers import linear, read_state_dict
from distil_rank.proteins.embedding_files import load_matrix
from distil_rank.core.randomness import generator
from distil_rank.core.records import config_record, environment, require_writable, sha256, shown_path
from distil_rank.core.moments import Moments

MODEL_FLAGS = (
    *("evaluation", "ratio", "method", "unit", "sensitivity", "sequential", "include", "exclude"),
    *("recover", "dms", "merge", "max_residues", "moments_out"),
)


def run_head(config: Config) -> None:
    unused(config, MODEL_FLAGS, "with --data, they are for models")
    assert config.data is not None
    size = None if config.bytes is None else parse_bytes(config.bytes)
    Request(config.rank, config.fvu, config.speedup, size).check()
    head = load_head(Path(config.target), config.key, config.activation)
    first = head if isinstance(head, nn.Linear) else cast(nn.Linear, head[0])
    data = load_matrix(config.data)
    check_rows(data, first.in_features, "data")
    if config.val_labels is not None and config.val is None:
        raise InputError("--val required beside --val-labels, got none; labels of --data are --labels")
    labels = None if config.labels is None else load_labels(config.labels, len(data))
    if config.val is not None:
        train, held_out = data, load_matrix(config.val)
        check_rows(held_out, first.in_features, "held-out data")
        labels = None if config.val_labels is None else load_labels(config.val_labels, len(held_out))
        if config.labels is not None and labels is None:
            raise InputError("--val-labels required beside --labels and --val: the metric is measured on held-out rows")
    else:
        count = round(config.held_out * len(data))
        if min(count, len(data) - count) < 2:
            raise InputError(
                f"at least 2 rows to fit and 2 to hold out required, got {len(data)} in all; give more data"
            )
        order = torch.randperm(len(data), generator=generator(config.seed, "held-out rows"))
        train, held_out = data[order[count:]], data[order[:count]]
        labels = None if labels is None else labels[order[:count].numpy()]
    if labels is not None:
        last = head if isinstance(head, nn.Linear) else [p for p in head if isinstance(p, nn.Linear)][-1]
        choose_metric(last.out_features, labels)
    prior = None if config.prior is None else _prior(config.prior, first.in_features)
    require_writable(config.out.absolute().parent)
    if config.out.exists():
        require_writable(config.out)

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
    if labels is not None:
        with torch.no_grad():
            before, after = head(held_out.to(first.weight)), small(held_out.to(first.weight))
        certificate["task"] = task_change(before, after, labels, config.seed)
    certificate |= {
        "latency": latency(head, small, held_out.to(first.weight)),
        "config": config_record(config),
        "data": {
            "source": shown_path(config.data),
            "sha256": sha256(config.data),
            "n_train": len(train),
            "n_val": len(held_out),
        },
        "teacher": {"source": shown_path(config.target), "sha256": sha256(config.target)},
        "seeds": [config.seed],
        "environment": environment(),
        "machine_dependent": ["latency", "environment"],
    }
    save(small, config.out, certificate=certificate, readme=readme(config, certificate))
    if config.onnx:
        export_onnx(small, held_out[:2].to(first.weight), config.out / "model.onnx")
    print(summary(certificate, config.out))


def load_head(path: Path, keys: tuple[str, ...], activation: str | None) -> nn.Linear | nn.Sequential:
    """The layers named by `keys` (or under one prefix) of a state dict, with the activation between them; InputError."""
    tensors = read_state_dict(path)
    names = [name.removesuffix("weight").rstrip(".") for name in tensors if name.split(".")[-1] == "weight"]
    matrices = [name for name in names if tensors[_weight(name)].ndim == 2]
    if not matrices:
        raise InputError(
            f"at least one linear layer (a 2-D weight) required in {path}, got {', '.join(tensors) or 'nothing'}"
        )
    chosen: list[str] = []
    for key in keys or ("",):
        key = key.removesuffix(".weight")
        under = [key] if key in matrices else [n for n in names if not key or n.startswith(f"{key}.")]
        if not under:
            raise InputError(
                f"key {key!r} required in {path}, which has layers {', '.join(matrices)}; choose one with --key"
            )
        odd = [n for n in under if n not in matrices]
        if odd:
            raise InputError(
                f"linear layers only required, {odd[0]} in {path} is none; name layers with --key, or use Python"
            )
        chosen += sorted(under, key=_natural)
    layers = [_layer(tensors, name, path) for name in chosen]
    for (a, first), (b, second) in zip(zip(chosen, layers), list(zip(chosen, layers))[1:]):
        if first.out_features != second.in_features:
            raise InputError(
                f"layers that fit together required, {a!r} puts out {first.out_features} features and {b!r} reads "
                f"{second.in_features}; name them in order with --key"
            )
    if len(layers) == 1:
        return layers[0]
    if activation is None:
        raise InputError(
            f"an activation between the {len(layers)} layers {', '.join(chosen)} required; say --activation relu"
        )
    parts: list[nn.Module] = [layers[0]]
    for layer in layers[1:]:
        parts += [ACTIVATIONS[activation](), layer]
    return nn.Sequential(*parts).eval()


def _weight(name: str) -> str:
    return f"{name}.weight" if name else "weight"


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorting key in which layer 10 follows layer 2."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"[.]", name)]


def _layer(tensors: dict[str, Tensor], name: str, path: Path) -> nn.Linear:
    weight, bias = tensors[_weight(name)], tensors.get(_weight(name).removesuffix("weight") + "bias")
    if not weight.is_floating_point():
        raise InputError(f"floating-point weights required, {name} in {path} is {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"a bias ({len(weight)},) required for {name} in {path}, got {tuple(bias.shape)}")
    if not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
        raise InputError(f"finite weights required, {name} in {path} has NaN or infinity")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return linear(weight.to(dtype), None if bias is None else bias.to(dtype))


def _prior(path: Path, d_in: int) -> Moments:
    from distil_rank.core.prior import load_prior

    found = load_prior(path).get("")
    if found is None or found[1].dim != d_in:
        got = "moments of a whole model" if found is None else f"{found[1].dim} features"
        raise InputError(f"prior moments of {d_in} features required for this layer, got {got} in {path}")
    return found[1]


def latency(head: nn.Module, small: nn.Module, rows: Tensor) -> list[dict[str, Any]]:
    """Speed-up by batch size, teacher and student timed in turn on one thread."""
    inputs = [rows[torch.arange(batch) % len(rows)] for batch in (1, 32, 512)]
    keys = ("batch", "threads", "teacher_ms", "student_ms", "speedup")
    return [{key: record[key] for key in keys} for record in compare_latency(head, small, inputs, rounds=20)]


def export_onnx(module: nn.Module, x: Tensor, path: Path) -> None:
    """Write the module as ONNX with a free batch axis; atomic."""
    import logging
    import warnings

    temporary = path.with_suffix(".tmp.onnx")
    try:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = torch.export.Dim("rows", min=1)
            program = torch.onnx.export(
                module.eval(),
                (x,),
                dynamo=True,
                dynamic_shapes=({0: rows},),
                input_names=["x"],
                output_names=["y"],
                verbose=False,
            )
        assert program is not None
        program.save(temporary, external_data=False)
        temporary.replace(path)
    except ImportError as error:
        raise InputError(
            f"the packages onnx and onnxscript required for --onnx, got: {error}; pip install onnx onnxscript"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def readme(config: Config, certificate: dict[str, Any]) -> str:
    held = certificate["output_fvu"]["held_out"]
    what = " ".join([shown_path(config.target), *config.key])
    return f"""Compressed from {what} by Distil-Rank; FVU on held-out rows \
{held["value"]:.3g} [{held["low"]:.3g}, {held["high"]:.3g}] (see certificate.json).
```python
import distil_rank
y = distil_rank.load("{config.out.name}")(x)  # x (n, {certificate["layers"][0]["d_in"]}) float tensor
```
"""


def summary(certificate: dict[str, Any], out: Path) -> str:
    held, lines = certificate["output_fvu"]["held_out"], []
    for layer in certificate["layers"]:
        shape = f"{layer['d_in']} -> {layer['d_out']}"
        if layer["rank"] is None:
            lines.append(f"  layer {layer['name']}  {shape}  {layer['note']}")
        else:
            lines.append(
                f"  layer {layer['name']}  {shape}  rank {layer['rank']}  held-out FVU {layer['held_out_achieved_fvu']:.4g} "
                f"(floor {layer['held_out_floor_fvu']:.4g})"
            )
    lines.append(
        f"output FVU {held['value']:.4g} [{held['low']:.4g}, {held['high']:.4g}] on "
        f"{certificate['held_out_rows']} held-out rows; "
        f"FLOPs / {certificate['flops_ratio']:.3g}; bytes {certificate['bytes_before']} -> {certificate['bytes_after']}"
    )
    best = certificate["layers"][0].get("equal_bytes", {}).get("best")
    if best and best["fvu"] < 0.9 * certificate["layers"][0].get("held_out_achieved_fvu", 0):
        lines.append(f"at the same bytes, {best['precision']} at rank {best['rank']} would have FVU {best['fvu']:.4g}")
    if "task" in certificate:
        task = certificate["task"]
        change = task["change"]
        lines.append(
            f"{task['metric']} {task['before']['value']:.4f} -> {task['after']['value']:.4f}, change {change['value']:+.4f} "
            f"[{change['low']:+.4f}, {change['high']:+.4f}] on {task['rows']} rows"
        )
    return "\n".join([*lines, f"written to {out}"])
