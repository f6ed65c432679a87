"""Whole models: rank allocations and baselines at equal parameters, paired over draws."""

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
from distil_rank.core.records import ROOT, Record
from distil_rank.proteins.fasta import AMINO_ACIDS, read_fasta

MODELS = ("nano-64", "nano-128", str(ROOT / "models" / "nano-teacher"))
RATIOS = {False: (0.1, 0.3, 0.5), True: (0.03, 0.1, 0.3)}  # by whether the model is causal
DRAWS = 3
PROTEINS, RESIDUES, TESTS = 60, 110, 32
BASELINE = ("plain SVD", "ASVD", "SVD-LLM")


def compare_models(data: Path, names: list[str]) -> Record:
    """Every method on every model, fitted on proteins of human, yeast and E. coli."""
    found = read_fasta(data / "proteins" / "human_yeast_ecoli.fasta.gz")
    plain = [p.sequence for p in found if len(p.sequence) >= 60]
    proteins = [s[:RESIDUES] for s in plain if not set(s) - set(AMINO_ACIDS)]
    models = {}
    for name in names:
        dense, architecture, _, digest = load_dense(name)
        models[Path(name).stem] = {"sha256": digest, **one_model(dense, architecture, proteins)}
    sizes = {"proteins_fitted": PROTEINS, "proteins_held_out": TESTS, "residues_at_most": RESIDUES}
    return {**sizes, "models": models}


def one_model(dense: nn.Module, architecture: Architecture, proteins: list[str]) -> Record:
    order = torch.randperm(len(proteins), generator=generator(0, "proteins")).tolist()
    tests = architecture.batches([proteins[i] for i in order[:TESTS]])
    shown = architecture.calibration(tests)
    sites = trace(dense, tests[0], find_sites(dense))
    weighed: dict[str, Any] = {"loss": architecture.loss}
    ours: dict[str, dict[str, Any]] = {
        "uniform": {"method": "uniform"},
        "energy": {"method": "energy"},
        "budget": {},
        "budget, sensitivity": weighed,
        "budget, sequential": {"sequential": True},
        "budget, sensitivity, sequential": {**weighed, "sequential": True},
    }
    records = []
    for draw in range(DRAWS):
        chosen = order[TESTS + draw * PROTEINS : TESTS + (draw + 1) * PROTEINS]
        batches = architecture.calibration(architecture.batches([proteins[i] for i in chosen]))
        for ratio in RATIOS[architecture.causal]:
            small = {}
            for label, options in ours.items():
                small[label], report = compress_model(dense, batches, ratio, **options)
                if label == "uniform":
                    ranks = {x.name: x.rank for x in report.layers}
            for label in BASELINE:
                small[label] = baseline_model(label, dense, batches, sites, ranks)
            for label, model in small.items():
                low_rank = {
                    s.name: part
                    for s in sites
                    if isinstance(part := model.get_submodule(s.name), LowRankLinear)
                }
                found = measure(dense, low_rank, shown, sites)
                whole = compare(architecture, dense, model, tests)
                records.append(
                    {
                        "parameters": sum(p.numel() for p in model.parameters()),
                        "mean_layer_fvu": sum(f.fvu for f in found.values()) / len(sites),
                        "perplexity": whole["perplexity_after"]["value"],
                        **{"draw": draw, "ratio": ratio, "method": label},
                    }
                )
    before = whole["perplexity_before"]["value"]
    return {"perplexity_before": before, "verdicts": verdicts(records), "records": records}


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


PAIRS = (
    *[("budget", other) for other in ("uniform", "energy", "plain SVD", "ASVD", "SVD-LLM")],
    *[("uniform", other) for other in ("plain SVD", "ASVD", "SVD-LLM")],
    *[
        ("budget, sensitivity", other)
        for other in ("uniform", "budget", "plain SVD", "ASVD", "SVD-LLM")
    ],
    ("budget, sequential", "budget"),
    ("budget, sensitivity, sequential", "uniform"),
    ("budget, sensitivity, sequential", "budget, sensitivity"),
)


def verdicts(records: list[Record]) -> list[Record]:
    """For pairs of methods: mean log ratio over draws with its interval; below 0 the first wins."""
    found = []
    for ratio in sorted({r["ratio"] for r in records}):
        for first, second in PAIRS:
            entry: Record = {"ratio": ratio, "first": first, "second": second}
            for key in ("mean_layer_fvu", "perplexity"):
                a, b = (
                    np.array([r[key] for r in records if (r["ratio"], r["method"]) == (ratio, m)])
                    for m in (first, second)
                )
                logs = np.log(a / b)
                low, high = t_interval(logs)
                better = int((logs < 0).sum())
                entry[key] = {"log_ratio": float(logs.mean()), "low": low, "high": high}
                entry[key]["better_in"] = better
            found.append({**entry, "draws": DRAWS})
    return found
