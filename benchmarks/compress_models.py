"""Whole models: rank allocations and baselines at equal parameters, paired over calibration draws."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.compress.architectures import Architecture
from distil_rank.compress.calibration import Fidelity, measure
from distil_rank.compress.dense_models import load_dense, weights_file
from distil_rank.compress.evaluate import perplexity
from distil_rank.core.lowrank import LowRankLinear
from distil_rank.compress.models import compress_model, replaced
from distil_rank.compress.sites import Batch, Site, call, find_sites, read_mask, rows_of, trace, watching
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, sha256
from distil_rank.core.intervals import t_interval
from tests.reference_compress import BASELINES

MODELS = ("nano-64", "nano-128", str(ROOT / "models" / "nano-teacher"))
RATIOS = {False: (0.1, 0.3, 0.5), True: (0.03, 0.1, 0.3)}  # by whether the model is causal
DRAWS = 3
PROTEINS, RESIDUES, TESTS = 60, 110, 32


def sequences(data: Path) -> list[str]:
    """Proteins of human, yeast and E. coli, cut after RESIDUES."""
    with gzip.open(data / "proteins" / "human_yeast_ecoli.fasta.gz", "rt") as file:
        records = file.read().split(">")[1:]
    found = ["".join(r.split("\n")[1:]) for r in records]
    return [s[:RESIDUES] for s in found if len(s) >= 60 and not set(s) - set("ACDEFGHIKLMNPQRSTVWY")]


def baseline_model(
    method: str, model: nn.Module, batches: list[Batch], sites: list[Site], calls: dict, ranks: dict[str, int | None]
) -> nn.Module:
    """The model with every layer compressed by a reference method, in its best form (bias refitted), at these ranks."""
    rows: dict[str, list[Tensor]] = {s.name: [] for s in sites}
    for batch in batches:
        kept = read_mask(model, batch)

        def see(site: Site, x: Tensor, y: Tensor, kept=kept) -> None:
            rows[site.name].append(rows_of(x, calls[site.name].layout, kept))

        with watching(sites, see), torch.no_grad():
            call(model, batch)
    students: dict[str, nn.Module] = {}
    for site in sites:
        rank = ranks[site.name]
        if rank is not None:
            x = torch.cat(rows.pop(site.name)).double()
            bias = torch.zeros(site.d_out) if site.bias is None else site.bias
            A, B, b = BASELINES[method](site.weight.double(), bias.double(), x, rank, refit=True)
            students[site.name] = LowRankLinear(A.float(), B.float(), b.float()).eval()
    return replaced(model, students)


def compare_models(data: Path, names: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "proteins_fitted": PROTEINS,
        "proteins_held_out": TESTS,
        "residues_at_most": RESIDUES,
        "models": {},
    }
    for name in names:
        dense, architecture = load_dense(name)
        weights = sha256(weights_file(name))
        label = Path(name).stem
        result["models"][label] = {"sha256": weights, **one_model(dense, architecture, sequences(data))}
    return result


def one_model(dense: nn.Module, architecture: Architecture, proteins: list[str]) -> dict[str, Any]:
    order = torch.randperm(len(proteins), generator=generator(0, "proteins")).tolist()
    tests = architecture.batches([proteins[i] for i in order[:TESTS]])
    shown = architecture.calibration(dense, tests)
    sites = find_sites(dense)
    calls = trace(dense, tests[0], sites)
    called = [s for s in sites if s.name in calls]
    records = []
    for draw in range(DRAWS):
        chosen = order[TESTS + draw * PROTEINS : TESTS + (draw + 1) * PROTEINS]
        raw = architecture.batches([proteins[i] for i in chosen])
        batches = architecture.calibration(dense, raw)
        for ratio in RATIOS[architecture.causal]:
            ours = {
                "uniform": {"method": "uniform"},
                "energy": {"method": "energy"},
                "budget": {"method": "budget"},
                "budget, sensitivity": {"method": "budget", "loss": architecture.loss},
                "budget, sequential": {"method": "budget", "sequential": True},
                "budget, sensitivity, sequential": {"method": "budget", "loss": architecture.loss, "sequential": True},
            }
            for label, options in ours.items():
                small, report = compress_model(dense, batches, ratio, **options)
                records.append(
                    measured(architecture, dense, small, tests, shown, called, calls, report.parameters_after)
                )
                records[-1] |= {"draw": draw, "ratio": ratio, "method": label}
                if label == "uniform":
                    ranks = {x.name: x.rank for x in report.layers}
            for label in ("plain SVD", "ASVD", "SVD-LLM"):
                small = baseline_model(label, dense, batches, called, calls, ranks)
                records.append(
                    measured(
                        architecture,
                        dense,
                        small,
                        tests,
                        shown,
                        called,
                        calls,
                        sum(p.numel() for p in small.parameters()),
                    )
                )
                records[-1] |= {"draw": draw, "ratio": ratio, "method": label}
    before = perplexity(architecture, dense, tests)
    return {"perplexity_before": before, "verdicts": verdicts(records), "records": records}


def measured(
    architecture: Architecture,
    dense: nn.Module,
    small: nn.Module,
    tests: list[Batch],
    shown: list[Batch],
    sites: list[Site],
    calls: dict,
    size: int,
) -> dict[str, Any]:
    modules = dict(small.named_modules())
    students = {s.name: modules[s.name] for s in sites if isinstance(modules[s.name], LowRankLinear)}
    found: dict[str, Fidelity] = measure(dense, students, shown, sites, calls)
    mean = sum(f.fvu for f in found.values()) / len(sites)
    return {"parameters": size, "mean_layer_fvu": mean, "perplexity": perplexity(architecture, small, tests)}


PAIRS = (
    *[("budget", other) for other in ("uniform", "energy", "plain SVD", "ASVD", "SVD-LLM")],
    *[("uniform", other) for other in ("plain SVD", "ASVD", "SVD-LLM")],
    *[("budget, sensitivity", other) for other in ("uniform", "budget", "plain SVD", "ASVD", "SVD-LLM")],
    ("budget, sequential", "budget"),
    ("budget, sensitivity, sequential", "uniform"),
    ("budget, sensitivity, sequential", "budget, sensitivity"),
)


def verdicts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For pairs of methods: mean log ratio over draws with its interval; below 0 the first is better."""
    found = []
    for ratio in sorted({r["ratio"] for r in records}):
        for first, second in PAIRS:
            entry: dict[str, Any] = {"ratio": ratio, "first": first, "second": second}
            for key in ("mean_layer_fvu", "perplexity"):
                a, b = (
                    np.array([r[key] for r in records if r["ratio"] == ratio and r["method"] == method])
                    for method in (first, second)
                )
                logs = np.log(a / b)
                low, high = t_interval(logs)
                entry[key] = {
                    "log_ratio": float(logs.mean()),
                    "low": low,
                    "high": high,
                    "better_in": int((logs < 0).sum()),
                }
            found.append({**entry, "draws": DRAWS})
    return found
