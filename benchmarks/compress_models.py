"""Whole models at equal parameters: the metric of the model's function against the layers' own.

    python -m benchmarks.compress_models             # fills results/compress_fisher.json
    python -m benchmarks.compress_models nano-256    # one model of it

Fitted on proteins of human, yeast and E. coli, measured on DeepLoc's test set (Almagro Armenteros
et al., Bioinformatics 33, 2017). Data: $DISTIL_RANK_DATA or ../shared/data beside the checkout.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines import BASELINES
from distil_rank.compress.architectures import Architecture
from distil_rank.compress.calibration import measure
from distil_rank.compress.dense_models import load_dense
from distil_rank.compress.evaluate import compare
from distil_rank.compress.models import compress_model, replaced
from distil_rank.compress.sites import Batch, Read, Site, find_sites, observe, trace
from distil_rank.core.intervals import t_interval
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, Record, environment, read_json, sha256, write_json
from distil_rank.proteins.fasta import AMINO_ACIDS, read_fasta

SCHEMA = "distil-rank/benchmark-compress-models/1"
RESULT = ROOT / "benchmarks" / "results" / "compress_fisher.json"
DATA = Path(os.environ.get("DISTIL_RANK_DATA", ROOT.parent / "shared" / "data")) / "proteins"
FITTED, HELD_OUT = DATA / "human_yeast_ecoli.fasta.gz", DATA / "deeploc_test_set.fasta"
RATIOS, DRAWS = (0.3, 0.5), 3
PROTEINS, RESIDUES, TESTS = 40, 110, 24
OWN = ("uniform", "budget")
BASELINE = ("plain SVD",)  # at the uniform ranks, with refitted biases
MODELS = {
    "nano-128": (*OWN, *BASELINE, "Fisher", "Fisher, sequential"),
    "nano-256": ("budget", "Fisher"),
}
METRICS = ("logits_kl", "hidden_fvu", "perplexity_after")


def main(names: list[str]) -> None:
    fitted, held_out = sequences(FITTED), sequences(HELD_OUT)
    known = set(fitted)
    order = torch.randperm(len(held_out), generator=generator(0, "held-out proteins")).tolist()
    tests = [held_out[i] for i in order if held_out[i] not in known][:TESTS]
    for name in names or MODELS:
        found = {**one_model(name, MODELS[name], fitted, tests), "environment": environment("cpu")}
        data = {path.name: sha256(path) for path in (FITTED, HELD_OUT)}
        sizes = {"fitted": PROTEINS, "held_out": TESTS, "residues_at_most": RESIDUES}
        record: Record = {"schema": SCHEMA, "data": data, "proteins": {**sizes, "draws": DRAWS}}
        models = read_json(RESULT, SCHEMA)["models"] if RESULT.is_file() else {}
        models = {key: (models | {name: found})[key] for key in MODELS if key in {*models, name}}
        write_json(RESULT, {**record, "models": models, "machine_dependent": ["environment"]})


def sequences(path: Path) -> list[str]:
    """The starts of proteins of at least 60 residues, without unusual ones."""
    found = [p.sequence for p in read_fasta(path) if len(p.sequence) >= 60]
    return [s[:RESIDUES] for s in found if not set(s) - set(AMINO_ACIDS)]


def one_model(name: str, methods: tuple[str, ...], fitted: list[str], tests: list[str]) -> Record:
    dense, architecture, _, digest, _ = load_dense(name)
    held_out = architecture.batches(tests)
    shown = architecture.calibration(held_out)
    sites = trace(dense, shown, find_sites(dense))
    order = torch.randperm(len(fitted), generator=generator(0, "fitted proteins")).tolist()
    records: list[Record] = []
    for draw in range(DRAWS):
        chosen = [fitted[i] for i in order[draw * PROTEINS : (draw + 1) * PROTEINS]]
        batches = architecture.calibration(architecture.batches(chosen))
        for ratio in RATIOS:
            for method in methods:
                small = student(method, dense, architecture, batches, sites, ratio)
                parts = {s.name: small.get_submodule(s.name) for s in sites}
                low_rank = {k: m for k, m in parts.items() if isinstance(m, LowRankLinear)}
                losses = measure(dense, low_rank, shown, sites)
                whole = compare(architecture, dense, small, held_out)
                found = {"draw": draw, "ratio": ratio, "method": method}
                found["parameters"] = sum(p.numel() for p in small.parameters())
                found["layer_fvu"] = sum(x.fvu for x in losses.values()) / len(sites)
                records.append(found | {key: whole[key] for key in METRICS})
                print(found, whole["logits_kl"], whole["hidden_fvu"], flush=True)
    before = whole["perplexity_before"]
    comparisons = [against(records, ratio, m) for ratio in RATIOS for m in methods if m != "budget"]
    return {
        "sha256": digest,
        "perplexity": before,
        "against_budget": comparisons,
        "records": records,
    }


def student(
    method: str,
    dense: nn.Module,
    architecture: Architecture,
    batches: list[Batch],
    sites: list[Site],
    ratio: float,
) -> nn.Module:
    options: dict[str, Any] = {"loss": architecture.loss, "sequential": "sequential" in method}
    if not method.startswith("Fisher"):
        options = {"loss": None, "method": "budget" if method == "budget" else "uniform"}
    small, report = compress_model(dense, batches, ratio, **options)
    if method not in BASELINE:
        return small
    return baseline_model(method, dense, batches, sites, {x.name: x.rank for x in report.layers})


def baseline_model(
    method: str,
    model: nn.Module,
    batches: list[Batch],
    sites: list[Site],
    ranks: Mapping[str, int | None],
) -> nn.Module:
    """The model compressed by a reference method, its bias refitted, at these ranks."""
    rows: dict[str, list[Tensor]] = {s.name: [] for s in sites}
    for batch in batches:

        def see(site: Site, read: Read) -> None:
            rows[site.name].append(read("input").clone())

        observe(model, batch, sites, see)
    students = {}
    for site in sites:
        rank = ranks[site.name]
        if rank is not None:
            x = torch.cat(rows.pop(site.name)).double()
            bias = torch.zeros(site.d_out) if site.bias is None else site.bias
            weight = site.weight.double()
            factors = BASELINES[method](weight, bias.double(), x, rank, refit=True)
            students[site.name] = LowRankLinear(*(f.float() for f in factors)).eval()
    return replaced(model, students)


def against(records: list[Record], ratio: float, method: str) -> Record:
    """Geometric mean over draws of each loss over that of `budget`, paired, with its interval."""
    found: Record = {"ratio": ratio, "method": method}
    for key in ("logits_kl", "hidden_fvu"):
        a, b = (
            np.array([r[key]["value"] for r in records if (r["ratio"], r["method"]) == (ratio, m)])
            for m in (method, "budget")
        )
        logs = np.log(a / b)
        low, high = np.exp(t_interval(logs))
        found[key] = {"value": float(np.exp(logs.mean())), "low": float(low), "high": float(high)}
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
