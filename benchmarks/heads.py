"""Trained heads made smaller: layer by layer, and as one map in closed form.

    python -m benchmarks.heads                            # writes benchmarks/results/heads.json
    python -m benchmarks.heads head.onnx train.pt val.pt  # another head: prints its table

Public heads and data: $DISTIL_RANK_DATA or ../shared/data beside the checkout.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.compress import DATA
from distil_rank.compress.head_certificate import flops
from distil_rank.compress.head_function import split
from distil_rank.compress.heads import compress_head
from distil_rank.compress.quantise import module_bytes, rounded
from distil_rank.core.agreement import function_kept, measure_for
from distil_rank.core.functions import distill_function, fvu
from distil_rank.core.heads import UnitNorm, load_head
from distil_rank.core.linear import linear
from distil_rank.core.lowrank import leading_eigenpairs
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, Record, environment, sha256, write_json
from distil_rank.core.weights import read_state_dict
from distil_rank.proteins.embedding_files import load_matrix

SCHEMA = "distil-rank/benchmark-heads/1"
RESULT = ROOT / "benchmarks" / "results" / "heads.json"
RATIOS = (2, 4, 5, 8, 10, 16)  # weights before / after
FEW = (20, 50, 340)  # proteins
CLIP, TOWERS = "heads/proteinclip_esm2_6.onnx", "heads/hatspot_towers_650m.safetensors"
FILES = {
    "ProteinCLIP 8M": CLIP,
    "HatSpot towers": TOWERS,
    "peptides": "esm2_8m_peptides/embeddings_train.pt",
    "viral": "esm2_8m_viral/viral_555.npz",
    "GB1": "esm2_8m_gb1/train.npz",
    "activation domains": "esm2_650m/activation_domains_148.npz",
}


def head_of(path: Path) -> nn.Sequential:
    """A head that scales its inputs itself."""
    found = load_head(path)
    return nn.Sequential(*([UnitNorm()] if found.unit_norm_inputs else []), *found).eval()


def towers() -> nn.Sequential:
    """ln Kd as a function of the domain, the other tower held at its mean output."""
    path = DATA / TOWERS
    domain = load_head(path, ("domain_fc1", "domain_bn1"))
    combined = load_head(path, ("fc_combined", "bn_combined"))[0]
    last = load_head(path, "output_layer")
    fixed = read_state_dict(path)["tf_bn1.bias"].relu()  # the mean of a BatchNorm is its bias
    width = len(fixed)
    weight, bias = combined.weight, combined.bias + combined.weight[:, :width] @ fixed
    inner = linear(weight[:, width:].contiguous(), bias)
    return nn.Sequential(*domain, nn.ReLU(), inner, nn.ReLU(), *last).eval()


def matrix(name: str) -> Tensor:
    return load_matrix(DATA / name).float()


def rows_of(name: str) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to measure on."""
    if name == "peptides":
        folder = "esm2_8m_peptides/embeddings_"
        return matrix(f"{folder}train.pt"), matrix(f"{folder}val.pt")
    if name == "GB1":
        return matrix("esm2_8m_gb1/train.npz"), matrix("esm2_8m_gb1/valid.npz")
    if name == "viral":  # the last genomes are held out
        found = np.load(DATA / FILES[name])
        x, starts = torch.from_numpy(found["X"]).float(), found["ptr"]
        cut = int(starts[np.searchsorted(starts, 0.7 * len(x))])
        return x[:cut], x[cut:]
    x = matrix(FILES[name])
    order = torch.randperm(len(x), generator=generator(0, "held-out rows"))
    return x[order[:100]], x[order[100:]]


def students(head: nn.Sequential, x: Tensor, val: Tensor, measure: str) -> Iterator[Record]:
    """Every student at every size: weights before / after, bytes, and outputs on held-out rows."""
    forms = {
        "layer by layer": {"metric": "own"},
        "layer by layer, output metric": {"metric": "output"},
        "one map": {"metric": "whole"},
        "one map, int8": {"metric": "whole", "int8": True},
    }
    before = module_bytes(head)
    limit = min(x.shape[1], head(x[:2]).shape[1])
    done = set()  # maps of one output: of rank 1 at any size
    for ratio, (name, options) in itertools.product(RATIOS, forms.items()):
        size = {"bytes": before // ratio} if "int8" in options else {"speedup": ratio}
        if name in done:
            continue
        try:
            certificate = compress_head(head, x, val, **size, **options)[1]
        except ValueError:  # no such student is that small
            continue
        if options["metric"] == "whole" and certificate.layers[0].rank == limit == 1:
            done.add(name)
        yield {
            "student": name,
            "asked": ratio,
            "weights_ratio": certificate.flops_ratio,
            "bytes_ratio": before / certificate.bytes_after,
            "ranks": [layer.rank for layer in certificate.layers],
            "kept": certificate.kept[measure],
            "fvu": certificate.output_fvu["held_out"]["value"],
        }
    eight = [int8_layer(part) if isinstance(part, nn.Linear) else part for part in head]
    small_bytes = sum(
        p.numel() + 8 * len(p) for p in head.parameters() if p.ndim == 2
    )  # a scale and a bias a row
    yield {
        "student": "dense int8",
        "weights_ratio": 1.0,
        "bytes_ratio": before / small_bytes,
        "outputs": nn.Sequential(*eight)(val),
    }
    first, f, last = split(list(head))
    y = f(nn.Sequential(*first)(val))
    for ratio in RATIOS:
        rank = flops(list(f)) // ratio // (x.shape[1] + y.shape[1])
        if 1 <= rank <= y.shape[1]:
            mean, U = y.double().mean(0), leading_eigenpairs(Moments.of(y).covariance, rank)[1]
            best = (mean + (y.double() - mean) @ U @ U.T).to(y)
            yield {
                "student": "floor",
                "asked": ratio,
                "weights_ratio": flops(list(f)) / rank / (x.shape[1] + y.shape[1]),
                "ranks": [rank],
                "outputs": nn.Sequential(*last)(best),
            }


def int8_layer(layer: nn.Linear) -> nn.Linear:
    """The layer with weights rounded to eight bits, a scale a row."""
    integers, scale = rounded(layer.weight.detach())
    return linear(integers.float() * scale[:, None], layer.bias)


def measured(found: Record, y: Tensor, measure: str) -> Record:
    outputs = found.pop("outputs", None)
    if outputs is None:  # its certificate has it
        return found
    return {**found, "kept": function_kept(y, outputs, measure), "fvu": fvu(outputs, y)}


def compare(head: nn.Sequential, x: Tensor, val: Tensor) -> Record:
    """One head on one data set."""
    y = head(val)
    measure = measure_for(y.shape[1], isinstance(head[-1], UnitNorm))
    start = time.process_time()
    records = [measured(found, y, measure) for found in students(head, x, val, measure)]
    return {
        "measure": measure,
        "n_train": len(x),
        "n_val": len(val),
        "students": records,
        "processor_seconds": time.process_time() - start,
    }


def one_map(head: nn.Sequential, x: Tensor, rank: int, **options: Any) -> nn.Module:
    first, f, last = split(list(head))
    before = nn.Sequential(*first)
    return nn.Sequential(before, distill_function(f, before(x), rank, **options)[0], *last)


def across(head: nn.Sequential, sets: dict[str, tuple[Tensor, Tensor]], rank: int) -> list[Record]:
    """Fitted on one data set, used on another's held-out rows, at one size."""
    records = []
    ratio = flops(list(head)) / rank / (head[1].in_features + head[-2].out_features)
    for name, (x, _) in sets.items():
        small = {
            "one map": one_map(head, x, rank),
            "layer by layer, output metric": compress_head(head, x, speedup=ratio)[0],
        }
        for other, (_, val) in sets.items():
            for form, student in small.items():
                kept = function_kept(head(val), student(val), "neighbors")
                records.append({"fitted": name, "used": other, "student": form, "kept": kept})
    return records


def few_rows(head: nn.Sequential, x: Tensor, val: Tensor, rank: int) -> list[Record]:
    """One map from few proteins: plain regression, with drawn inputs, and with the Jacobian."""
    first, f, last = split(list(head))
    before, after = nn.Sequential(*first), nn.Sequential(*last)
    forms: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
        "no derivatives": (torch.no_grad()(f), "data"),
        "no derivatives, drawn inputs": (torch.no_grad()(f), "drawn"),
        "mean Jacobian": (f, "data"),
        "mean Jacobian, drawn inputs": (f, "drawn"),
    }
    records = []
    for n, (name, (function, inputs)) in itertools.product(FEW, forms.items()):
        order = torch.randperm(len(x), generator=generator(n, "few rows"))[:n]
        student, found = distill_function(function, before(x[order]), rank, inputs)
        kept = function_kept(head(val), after(student(before(val))), "neighbors")
        choice = {"ridge": str(found.ridge), "share": found.share, "width": found.width}
        records.append({"n": n, "form": name, **choice, "kept": kept})
    return records


def main(arguments: list[str]) -> None:
    from benchmarks.tables_heads import draw, sizes

    if arguments:
        head, x, val = head_of(Path(arguments[0])), *map(load_matrix, arguments[1:])
        print(sizes({"cells": {f"{arguments[0]} x {arguments[1]}": compare(head, x, val)}}))
        return
    passport = environment()  # before anything is written
    clip = head_of(DATA / CLIP)
    sets = {name: rows_of(name) for name in ("peptides", "viral", "GB1")}
    cells = {}
    for name, (x, val) in sets.items():
        cells[f"ProteinCLIP 8M x {name}"] = compare(clip, x, val)
        print(name, f"{cells[f'ProteinCLIP 8M x {name}']['processor_seconds']:.0f} s", flush=True)
    cells["HatSpot towers x activation domains"] = compare(towers(), *rows_of("activation domains"))
    first, f, _ = split(list(clip))
    x, val = (nn.Sequential(*first)(t) for t in sets["peptides"])
    start = time.process_time()
    certificate = vars(distill_function(f, x, 64, held_out=val)[1])
    record = {
        "schema": SCHEMA,
        "cells": cells,
        "certificate": certificate | {"processor_seconds": time.process_time() - start},
        "across": across(clip, sets, 64),
        "few_rows": few_rows(clip, *sets["peptides"], 64),
        "data": {
            name: {"file": path, "sha256": sha256(DATA / path)} for name, path in FILES.items()
        },
        "environment": passport,
        "machine_dependent": ["environment", "processor_seconds"],
    }
    write_json(RESULT, record)
    draw(record)
    print(sizes(record))


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
