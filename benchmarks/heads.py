"""Trained heads made smaller: layer by layer, and as one map in closed form.

    python -m benchmarks.heads                            # writes benchmarks/results/heads.json
    python -m benchmarks.heads "one narrow layer"         # renews or adds one class of students
    python -m benchmarks.heads times                      # FLOPs, bytes, milliseconds: idle machine
    python -m benchmarks.heads head.onnx train.pt val.pt  # another head: prints its table

Public heads and data: $DISTIL_RANK_DATA or ../shared/data beside the checkout.
"""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import DATA
from distil_rank.compress.head_certificate import flops
from distil_rank.compress.head_function import split
from distil_rank.compress.head_students import FLOOR, FORMS, INT8, METRICS, compare
from distil_rank.compress.heads import WHOLE, compress_head
from distil_rank.compress.quantise import QuantLinear, in_place, module_bytes
from distil_rank.core.agreement import function_kept
from distil_rank.core.devices import threads
from distil_rank.core.errors import InputError, one_line_errors
from distil_rank.core.functions import distill_function
from distil_rank.core.heads import load_head
from distil_rank.core.latency import interleaved, quartiles
from distil_rank.core.linear import LowRankLinear, linear
from distil_rank.core.narrow import PartGELU
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, Record, environment, read_json, sha256, write_json
from distil_rank.core.weights import read_state_dict
from distil_rank.proteins.embedding_files import load_matrix

SCHEMA = "distil-rank/benchmark-heads/1"
RESULT = ROOT / "benchmarks" / "results" / "heads.json"
RATIOS = (2, 4, 5, 8, 10, 16)  # weights before / after
CELLS = [f"ProteinCLIP 8M x {data}" for data in ("peptides", "viral", "GB1")]
CELLS.append("HatSpot towers x activation domains")
FEW = (20, 50, 340)  # proteins
BATCHES, ROUNDS = (1, 512), 50  # of times
CLIP, TOWERS = "heads/proteinclip_esm2_6.onnx", "heads/hatspot_towers_650m.safetensors"
FILES = {
    "ProteinCLIP 8M": CLIP,
    "HatSpot towers": TOWERS,
    "peptides": "esm2_8m_peptides/embeddings_train.pt",
    "viral": "esm2_8m_viral/viral_555.npz",
    "GB1": "esm2_8m_gb1/train.npz",
    "activation domains": "esm2_650m/activation_domains_148.npz",
}


def towers() -> nn.Sequential:
    """ln Kd as a function of the domain, the other tower held at its mean output."""
    path = DATA / TOWERS
    domain = load_head(path, ("domain_fc1", "domain_bn1"))
    combined = load_head(path, ("fc_combined", "bn_combined"))[0]
    assert isinstance(combined, nn.Linear)
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


def head_of(name: str) -> nn.Sequential:
    return towers() if name.startswith("HatSpot") else load_head(DATA / CLIP).whole


def cell(name: str, forms: Sequence[str] = FORMS) -> Record:
    """One head on one data set."""
    start = time.process_time()
    rows = rows_of(name.partition(" x ")[2])
    found = compare(head_of(name), *rows, ratios=RATIOS, forms=forms)
    return {**found, "processor_seconds": time.process_time() - start}


def one_map(head: nn.Sequential, x: Tensor, rank: int, **options: Any) -> nn.Module:
    before, f, after = split(list(head))
    return nn.Sequential(before, distill_function(f, before(x), rank, **options)[0], after)


def across(head: nn.Sequential, sets: dict[str, tuple[Tensor, Tensor]], rank: int) -> list[Record]:
    """Fitted on one data set, used on another's held-out rows, at one size."""
    records = []
    ratio = flops(head) / rank / sum(ends(head))
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
    before, f, after = split(list(head))
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


def shaped(parts: Sequence[nn.Module], student: Record) -> nn.Module:
    """The student's shape, which its bytes and times depend on, without its weights.

    Where a record does not say how many features of a narrow layer are bent, an eighth are.
    """
    form, ranks = student["student"], iter(student.get("ranks", ()))
    eight = "int8" in form
    if METRICS.get(form) in WHOLE:
        before, f, after = split(parts)
        (d_in, d_out), rank = ends(f), next(ranks)
        if eight:
            A, B = QuantLinear.empty(d_in, rank, 8, False), QuantLinear.empty(rank, d_out, 8, True)
            return nn.Sequential(before, in_place(A, B), after)
        if METRICS[form] == "narrow" and (bent := student.get("bent", rank // 8)):
            inner = nn.Linear(d_in, rank), PartGELU(rank - bent), nn.Linear(rank, d_out)
            return nn.Sequential(before, *inner, after)
        return nn.Sequential(before, low_rank(d_in, d_out, rank), after)
    made = []
    for part in parts:
        if isinstance(part, nn.Linear):
            shape = part.in_features, part.out_features
            if form == INT8:
                part = QuantLinear.empty(*shape, 8, True)
            elif rank := next(ranks):
                part = low_rank(*shape, rank)
        made.append(part)
    return nn.Sequential(*made)


def ends(f: nn.Sequential) -> tuple[int, int]:
    layers = [part for part in f if isinstance(part, nn.Linear)]
    return layers[0].in_features, layers[-1].out_features


def low_rank(d_in: int, d_out: int, rank: int) -> LowRankLinear:
    return LowRankLinear(torch.ones(rank, d_in), torch.ones(d_out, rank), torch.ones(d_out))


def timed(known: Record, head: nn.Sequential, done: Record) -> None:
    """FLOPs, bytes and milliseconds, beside the dense head's, of every student of one cell."""
    parts = list(head.float())
    inputs = [torch.randn(n, ends(head)[0], generator=generator(0, "times")) for n in BATCHES]
    known["flops"], known["bytes"] = 2 * flops(parts), module_bytes(head)
    for student in known["students"]:
        if student["student"] == FLOOR:
            continue
        made = shaped(parts, student).eval()
        student["flops"] = round(known["flops"] / student["weights_ratio"])
        student["bytes"] = module_bytes(made)
        shape = f"{made} {student['bytes']} {student.get('bent')}"
        if shape not in done:  # students of other data may have it too
            done[shape] = []
            for x in inputs:
                samples = interleaved([partial(m, x) for m in (head, made)], x, ROUNDS)
                ratio = quartiles(samples[:, 0] / samples[:, 1], True)
                ms = {
                    key: quartiles(column, False)
                    for key, column in zip(("dense_ms", "ms"), samples.T)
                }
                done[shape].append({"batch": len(x), **ms, "speedup": ratio})
        student["times"] = done[shape]


def with_times() -> Record:
    """The record with what every student costs, by its shape: nothing is fitted again."""
    record, done = read_json(RESULT, SCHEMA), dict[str, Any]()
    with torch.inference_mode(), threads(1):
        for name, known in record["cells"].items():
            timed(known, head_of(name), done)
            print(name, flush=True)
    record["times"] = {"rounds": ROUNDS, "threads": 1, "environment": environment()}
    record["machine_dependent"] = ["environment", "processor_seconds", "times"]
    return record


def main(arguments: list[str]) -> None:
    from benchmarks.tables_heads import draw, sizes

    if arguments and Path(arguments[0]).suffix:
        head, x, val = load_head(arguments[0]).whole, *map(load_matrix, arguments[1:])
        print(sizes({"cells": {f"{arguments[0]} x {arguments[1]}": compare(head, x, val)}}))
        return
    passport = environment()  # before anything is written
    if unknown := set(arguments) - {*FORMS, "times"}:
        known = ", ".join((*FORMS, "times"))
        raise InputError(f"students out of {known} required, got {', '.join(unknown)}")
    if arguments == ["times"]:
        record = with_times()
    else:
        record = renewed(arguments) if arguments else everything()
        record |= {"schema": SCHEMA, "environment": passport}
    write_json(RESULT, record)
    draw(record)
    print(sizes(record))


def renewed(forms: list[str]) -> Record:
    """The record with some students measured again, or added."""
    record = read_json(RESULT, SCHEMA)
    for name, known in record["cells"].items():
        kept = [s for s in known["students"] if s["student"] not in forms]
        known["students"] = kept + cell(name, forms)["students"]
        print(name, flush=True)
    return record


def everything() -> Record:
    cells = {}
    for name in CELLS:
        cells[name] = cell(name)
        print(name, f"{cells[name]['processor_seconds']:.0f} s", flush=True)
    clip, sets = (
        load_head(DATA / CLIP).whole,
        {name: rows_of(name) for name in ("peptides", "viral", "GB1")},
    )
    before, f, _ = split(list(clip))
    x, val = map(before, sets["peptides"])
    start = time.process_time()
    certificate = vars(distill_function(f, x, 64, held_out=val)[1])
    return {
        "cells": cells,
        "certificate": certificate | {"processor_seconds": time.process_time() - start},
        "across": across(clip, sets, 64),
        "few_rows": few_rows(clip, *sets["peptides"], 64),
        "data": {
            name: {"file": path, "sha256": sha256(DATA / path)} for name, path in FILES.items()
        },
        "machine_dependent": ["environment", "processor_seconds"],
    }


if __name__ == "__main__":
    with torch.no_grad(), one_line_errors("benchmarks.heads"):
        main(sys.argv[1:])
