"""The bars of compression, measured on real ESM-2 embeddings and on this repository's small models.

    python -m benchmarks.compress                  # everything but `large`
    python -m benchmarks.compress cells int8       # some parts
    python -m benchmarks.compress large            # a random ESM-2 of the 650M shape, 11 GB

Each part replaces its own entry of benchmarks/results/compress.json. Real data: $DISTIL_RANK_DATA
or ../shared/data beside the checkout.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines import BASELINES, fvu
from distil_rank.compress.head_layers import FEW
from distil_rank.compress.heads import compress_head
from distil_rank.compress.quantise import at_equal_bytes, certify_int8, imitated, quantise
from distil_rank.compress.tasks import task_change
from distil_rank.core.intervals import t_interval
from distil_rank.core.lowrank import Joint, optimum
from distil_rank.core.moments import Moments
from distil_rank.core.prior import blended_moments, folds_of
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, environment, read_json, sha256, write_json
from distil_rank.experiment.teachers import random_teacher, spectral_teacher, task_trained_teachers
from distil_rank.proteins.embedding_files import load_matrix

SCHEMA = "distil-rank/benchmark-compress/1"
RESULT = ROOT / "benchmarks" / "results" / "compress.json"
DATA = Path(os.environ.get("DISTIL_RANK_DATA", ROOT.parent / "shared" / "data"))


def peptides() -> tuple[Tensor, Tensor]:
    folder = DATA / "esm2_8m_peptides"
    return load_matrix(folder / "embeddings_train.pt").double(), load_matrix(
        folder / "embeddings_val.pt"
    ).double()


def gb1() -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    parts = [np.load(DATA / "esm2_8m_gb1" / f"{name}.npz") for name in ("train", "valid")]
    x = [torch.from_numpy(part["X"]).double() for part in parts]
    return x[0], x[1], parts[0]["y"].astype(np.float64), parts[1]["y"].astype(np.float64)


def teachers(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias (float64) of the benchmark's three teachers for these rows."""
    layers = {
        "Random": random_teacher(x.shape[1], 0),
        "Task-Trained": task_trained_teachers(x.float(), [0])[0],
        "Spectral": spectral_teacher(x.shape[1], 0),
    }
    return {
        name: (layer.weight.detach().double(), layer.bias.detach().double())
        for name, layer in layers.items()
    }


def subset(x: Tensor, n: int, draw: int) -> Tensor:
    return x[torch.randperm(len(x), generator=generator(draw, "calibration draw"))[:n]]


def summary(values: list[float] | np.ndarray) -> dict[str, float]:
    """Mean with its Student interval."""
    low, high = t_interval(values)
    return {"value": float(np.mean(values)), "low": low, "high": high}


def cells() -> dict[str, Any]:
    """Held-out FVU of the closed form against other layer compressors.

    Over data x teachers x ranks x rows x draws.
    """
    records = []
    train, val = peptides()
    variants, variants_val, _, _ = gb1()
    for data, (x, held) in {
        "peptides": (train, val),
        "GB1 variants": (variants, variants_val),
    }.items():
        for teacher, (W, c) in teachers(x).items():
            for n in (200, 1000, len(x)):
                for draw in range(3 if n < len(x) else 1):
                    rows = subset(x, n, draw)
                    moments, folds = Moments.of(rows), folds_of(rows)
                    best = optimum(W, c, moments)
                    for rank in (8, 16, 32, 64):
                        record = {
                            "data": data,
                            "teacher": teacher,
                            "n": n,
                            "draw": draw,
                            "rank": rank,
                        }
                        record["optimum"] = fvu(W, c, best.factors(rank), held)
                        own, blend = moments, None
                        if n < FEW * x.shape[1]:  # as `distil-rank compress` does without a prior
                            own, blend = blended_moments(W, "input", folds, None, rank)
                        record["few rows"] = fvu(W, c, optimum(W, c, own).factors(rank), held)
                        record["own_weight"] = blend.weight if blend else 0.0
                        for name, method in BASELINES.items():
                            record[name] = fvu(W, c, method(W, c, rows, rank, refit=False), held)
                            record[f"{name}, refitted"] = fvu(
                                W, c, method(W, c, rows, rank, refit=True), held
                            )
                        records.append(record)
    methods = [form for name in BASELINES for form in (name, f"{name}, refitted")]
    against = {
        ours: {name: verdict(records, ours, name) for name in methods}
        for ours in ("optimum", "few rows")
    }
    against["few rows"]["optimum"] = verdict(records, "few rows", "optimum")
    return {"cells": len(records), "against": against, "records": records}


def verdict(records: list[dict[str, Any]], ours: str, name: str) -> dict[str, Any]:
    """Paired over cells; above 0 ours is better."""
    log_ratio = np.log([r[name] / r[ours] for r in records])
    enough = np.array([r["n"] >= 1000 for r in records])
    return {
        "share_no_worse": float(np.mean(log_ratio >= -1e-9)),
        "share_no_worse_within_1e-3": float(np.mean(log_ratio >= -1e-3)),
        "share_no_worse_with_more_rows_than_features": float(np.mean(log_ratio[enough] >= -1e-9)),
        "smallest_ratio": float(np.exp(log_ratio.min())),
        "mean_log_ratio": summary(log_ratio),
        "median_ratio": float(np.exp(np.median(log_ratio))),
    }


def prior() -> dict[str, Any]:
    """Fifty proteins with and without a prior, in domain (other peptides) and out of it (GB1)."""
    train, val = peptides()
    variants, _, _, _ = gb1()
    records = []
    for teacher, (W, c) in teachers(train).items():
        for rank in (16, 64):
            full_fvu = fvu(W, c, optimum(W, c, Moments.of(train)).factors(rank), val)
            for draw in range(10):
                order = torch.randperm(len(train), generator=generator(draw, "fifty proteins"))
                own, others = train[order[:50]], train[order[50:]]
                folds = folds_of(own)
                record = {"teacher": teacher, "rank": rank, "draw": draw, "full_data": full_fvu}
                alone = optimum(W, c, Moments.of(own)).factors(rank)
                record["no_prior"] = fvu(W, c, alone, val)
                for name, rows in (("in_domain", others), ("out_of_domain", variants)):
                    moments, blend = blended_moments(W, "input", folds, Moments.of(rows), rank)
                    record[name] = fvu(W, c, optimum(W, c, moments).factors(rank), val)
                    record[f"{name}_weight"] = blend.weight
                records.append(record)
    return {
        "proteins": 50,
        "in_domain_over_full_data": summary([r["in_domain"] / r["full_data"] for r in records]),
        "no_prior_over_full_data": summary([r["no_prior"] / r["full_data"] for r in records]),
        "worst_in_domain_over_full_data": max(r["in_domain"] / r["full_data"] for r in records),
        "worst_out_of_domain_over_no_prior": max(
            r["out_of_domain"] / r["no_prior"] for r in records
        ),
        "mean_out_of_domain_over_no_prior": summary(
            [r["out_of_domain"] / r["no_prior"] for r in records]
        ),
        "records": records,
    }


def int8() -> dict[str, Any]:
    """Extra held-out FVU of eight-bit factors at the same rank; every precision at equal bytes."""
    train, val = peptides()
    same, curves = [], {}
    for teacher, (W, c) in teachers(train).items():
        moments = Moments.of(train)
        best = optimum(W, c, moments)
        fitted, held = Joint.of_layer(W, c, moments), Joint.of_layer(W, c, Moments.of(val))
        for rank in (8, 16, 32, 64, 128):
            student = best.student(rank)
            found = certify_int8(student, quantise(student, imitated(student, fitted)), held)
            same.append(
                {
                    "teacher": teacher,
                    "rank": rank,
                    "low_rank": found.low_rank,
                    "quantisation": found.quantisation,
                }
            )
            same[-1] |= {
                "fvu": found.fvu,
                "extra": found.fvu / found.low_rank - 1,
                "bytes": found.bytes,
            }
        budgets = [4 * (2 * 320 * r + 320) for r in (8, 16, 32, 64)]
        curves[teacher] = [
            asdict(choice)
            for size in budgets
            for choice in at_equal_bytes(best.student, fitted, held, size)
        ]
    factors_won = []
    for curve in curves.values():
        for size in {point["bytes"] for point in curve}:
            at = {point["precision"]: point["fvu"] for point in curve if point["bytes"] == size}
            factors_won.append(at["float32"] / at["int8"])
    return {
        "worst_extra_fvu_at_same_rank": max(s["extra"] for s in same),
        "float32_over_int8_fvu_at_equal_bytes": {
            "median": float(np.median(factors_won)),
            "smallest": min(factors_won),
            "largest": max(factors_won),
        },
        "same_rank": same,
        "equal_bytes": curves,
    }


def head() -> dict[str, Any]:
    """An MLP head on ESM-2 embeddings of GB1 variants, compressed 10 x: Spearman with fitness."""
    x, held, y, y_held = (t.float() if isinstance(t, Tensor) else t for t in gb1())
    mean, scale = x.mean(0), x.std(0)
    x, held = (x - mean) / scale, (held - mean) / scale
    target = torch.from_numpy((y - y.mean()) / y.std()).float()
    records = []
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mlp = nn.Sequential(
                nn.Linear(320, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1)
            )
        optimiser = torch.optim.AdamW(mlp.parameters(), lr=1e-3, weight_decay=0.1)
        batches = generator(seed, "GB1 batches")
        for _ in range(600):
            rows = torch.randint(len(x), (128,), generator=batches)
            loss = (mlp(x[rows])[:, 0] - target[rows]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        mlp.eval().requires_grad_(False)
        bytes = 4 * sum(p.numel() for p in mlp.parameters()) // 10
        for metric, eight in (
            ("output", False),
            ("own", False),
            ("output", True),
            ("own", True),
        ):
            small, certificate = compress_head(
                mlp, x, held, bytes=bytes, metric=metric, int8=eight, seed=seed
            )
            change = asdict(task_change(mlp(held), small(held), y_held, seed))
            record = {
                "seed": seed,
                "metric": metric,
                "int8": eight,
                "flops_ratio": certificate.flops_ratio,
            }
            record |= {
                "bytes_ratio": certificate.bytes_before / certificate.bytes_after,
                "task": change,
            }
            record |= {
                "output_fvu": certificate.output_fvu["held_out"],
                "ranks": [layer.rank for layer in certificate.layers],
            }
            records.append(record)
    return {"n_train": len(x), "n_val": len(held), "records": records}


def large() -> dict[str, Any]:
    """Seconds and peak memory of compressing a random ESM-2 of the 650M shape."""
    import esm

    from distil_rank.compress.models import compress_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = esm.ESM2(33, 1280, 20, "ESM-1b").eval().requires_grad_(False)
    loaded = peak()
    source = generator(0, "tokens")
    batches = [torch.randint(4, 24, (2, 258), generator=source) for _ in range(3)]
    for tokens in batches:
        tokens[:, 0], tokens[:, -1] = 0, 2
    start, used = time.perf_counter(), time.process_time()
    _, report = compress_model(model, batches, ratio=0.5, loss=None, memory=2 << 30)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    return {
        "parameters": report.parameters,
        "parameters_after": report.parameters_after,
        "residues": sum(b.shape[0] * (b.shape[1] - 2) for b in batches),
        "seconds": seconds,
        "processor_seconds": used,
        "peak_gb": peak(),
        "peak_gb_before": loaded,
        "threads": torch.get_num_threads(),
        "machine_dependent": ["seconds", "processor_seconds", "peak_gb", "peak_gb_before"],
    }


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "cells": cells,
    "prior": prior,
    "int8": int8,
    "head": head,
    "large": large,
}


def main(names: list[str]) -> None:
    unknown = set(names) - set(PARTS)
    if unknown:
        raise SystemExit(
            f"parts out of {', '.join(PARTS)} required, got {', '.join(sorted(unknown))}"
        )
    for name in names or [n for n in PARTS if n != "large"]:
        start = time.perf_counter()
        found = PARTS[name]()
        record = read_json(RESULT, SCHEMA) if RESULT.is_file() else {"schema": SCHEMA}
        record[name] = {
            **found,
            "environment": environment(),
            "part_seconds": time.perf_counter() - start,
        }
        record["data"] = {
            "peptides": {
                "source": "UniDL4BioPep, ESM-2 8M",
                "sha256": sha256(DATA / "esm2_8m_peptides/embeddings_train.pt"),
            },
            "gb1": {
                "source": "GB1 of plm-finetune-eval, ESM-2 8M",
                "sha256": sha256(DATA / "esm2_8m_gb1/train.npz"),
            },
        }
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        write_json(RESULT, record)
        print(f"{name}: {record[name]['part_seconds']:.0f} s")
        for key, value in found.items():
            if key not in ("records", "same_rank", "equal_bytes", "models"):
                print(f"  {key}: {value}")


if __name__ == "__main__":
    main(sys.argv[1:])
