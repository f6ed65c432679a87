"""The bars of compression: one layer on real embeddings, whole models beside every alternative.

    python -m benchmarks.compress                    # all but `large`, `shape` and `times`
    python -m benchmarks.compress frontier nano-128  # some parts, of some models
    python -m benchmarks.compress frontier nano-128 draws=1
    python -m benchmarks.compress times              # milliseconds of the frontier: an idle machine
    python -m benchmarks.compress shape              # of the 650M shape, random weights, likewise
    python -m benchmarks.compress large              # a random ESM-2 of the 650M shape, 11 GB

Each part replaces its own entry of benchmarks/results/compress.json. Models are fitted on proteins
of human, yeast and E. coli and measured on DeepLoc's test set (Almagro Armenteros et al.,
Bioinformatics 33, 2017). Data: $DISTIL_RANK_DATA or ../shared/data beside the checkout.
"""

import copy
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import DATA
from benchmarks.baselines import BASELINES, fvu
from benchmarks.tables_compress import SCHEMA, draw_frontier
from distil_rank.compress.architectures import PHASES, Architecture
from distil_rank.compress.calibration import collect, measure
from distil_rank.compress.dense_models import load_dense
from distil_rank.compress.evaluate import compare, cost, masked_divergence
from distil_rank.compress.models import compress_model
from distil_rank.compress.neurons import PrunedMLP, find_mlps, selected
from distil_rank.compress.quantise import (
    GROUP,
    QuantLinear,
    in_place,
    module_bytes,
    on_integers,
    quantise_model,
    rounded,
)
from distil_rank.compress.ranks import largest_rank
from distil_rank.compress.sites import Batch, Read, Site, find_sites, observe, replaced, trace
from distil_rank.compress.storage import WEIGHTS, save
from distil_rank.core.intervals import t_interval
from distil_rank.core.linear import LowRankLinear, linear
from distil_rank.core.lowrank import optimum
from distil_rank.core.moments import Moments
from distil_rank.core.prior import blended_moments, folds_of
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, Record, environment, read_json, sha256, write_json
from distil_rank.experiment.teachers import random_teacher, spectral_teacher, task_trained_teachers
from distil_rank.proteins.embedding_files import load_matrix
from distil_rank.proteins.fasta import AMINO_ACIDS, read_fasta

RESULT = ROOT / "benchmarks" / "results" / "compress.json"
FILES = {
    "peptides": DATA / "esm2_8m_peptides/embeddings_train.pt",
    "gb1": DATA / "esm2_8m_gb1/train.npz",
    "fitted": DATA / "proteins/human_yeast_ecoli.fasta.gz",
    "held_out": DATA / "proteins/deeploc_test_set.fasta",
}
FEW = 4  # rows a feature, below which a layer is drawn to the weight's own prior
RATIOS, DRAWS = (0.3, 0.5), 3
PROTEINS, RESIDUES, TESTS = 40, 110, 24
FISHER = ("Fisher", "Fisher, sequential", "Fisher, neurons", "Fisher, neurons, sequential")
MODELS = {
    "nano-128": ("uniform", "budget", "plain SVD", *FISHER),
    "nano-256": ("budget", "Fisher", "Fisher, neurons"),
}
SMALLER = {"nano-128": "nano-64", "nano-256": "nano-128"}
METRICS = ("logits_kl", "hidden_fvu", "perplexity_after")


def peptides() -> tuple[Tensor, Tensor]:
    folder = DATA / "esm2_8m_peptides"
    return load_matrix(folder / "embeddings_train.pt").double(), load_matrix(
        folder / "embeddings_val.pt"
    ).double()


def gb1() -> tuple[Tensor, Tensor]:
    parts = [np.load(DATA / "esm2_8m_gb1" / f"{name}.npz") for name in ("train", "valid")]
    x = [torch.from_numpy(part["X"]).double() for part in parts]
    return x[0], x[1]


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
    for data, (x, held) in {"peptides": peptides(), "GB1 variants": gb1()}.items():
        for (teacher, (W, c)), n in itertools.product(teachers(x).items(), (200, 1000, len(x))):
            for draw in range(3 if n < len(x) else 1):
                rows = subset(x, n, draw)
                moments, folds = Moments.of(rows), folds_of(rows)
                best = optimum(W, c, moments)
                for rank in (8, 16, 32, 64):
                    record = {"data": data, "teacher": teacher, "n": n, "draw": draw, "rank": rank}
                    record["optimum"] = fvu(W, c, best.factors(rank), held)
                    own, blend = moments, None
                    if n < FEW * x.shape[1]:  # as `distil-rank compress` does without a prior
                        own, blend = blended_moments(W, "input", folds, None, rank)
                    record["few rows"] = fvu(W, c, optimum(W, c, own).factors(rank), held)
                    record["own_weight"] = blend.weight if blend else 0.0
                    for name, method in BASELINES.items():
                        for form, refit in ((name, False), (f"{name}, refitted", True)):
                            record[form] = fvu(W, c, method(W, c, rows, rank, refit), held)
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
    variants, _ = gb1()
    records = []
    for teacher, (W, c) in teachers(train).items():
        for rank in (16, 64):
            full_fvu = fvu(W, c, optimum(W, c, Moments.of(train)).factors(rank), val)
            for draw in range(10):
                order = torch.randperm(len(train), generator=generator(draw, "fifty proteins"))
                own, others = train[order[:50]], train[order[50:]]
                folds = folds_of(own)
                record: dict[str, Any] = {"teacher": teacher, "rank": rank, "draw": draw}
                record["full_data"] = full_fvu
                alone = optimum(W, c, Moments.of(own)).factors(rank)
                record["no_prior"] = fvu(W, c, alone, val)
                for name, rows in (("in_domain", others), ("out_of_domain", variants)):
                    moments, blend = blended_moments(W, "input", folds, Moments.of(rows), rank)
                    record[name] = fvu(W, c, optimum(W, c, moments).factors(rank), val)
                    record[f"{name}_weight"] = blend.weight
                records.append(record)

    def over(name: str, other: str) -> list[float]:
        return [r[name] / r[other] for r in records]

    return {
        "proteins": 50,
        "in_domain_over_full_data": summary(over("in_domain", "full_data")),
        "no_prior_over_full_data": summary(over("no_prior", "full_data")),
        "worst_in_domain_over_full_data": max(over("in_domain", "full_data")),
        "worst_out_of_domain_over_no_prior": max(over("out_of_domain", "no_prior")),
        "mean_out_of_domain_over_no_prior": summary(over("out_of_domain", "no_prior")),
        "records": records,
    }


def random_650m() -> nn.Module:
    import esm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return esm.ESM2(33, 1280, 20, "ESM-1b").eval().requires_grad_(False)


def large() -> dict[str, Any]:
    """Seconds and peak memory of compressing a random ESM-2 of the 650M shape."""
    model = random_650m()
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


def proteins() -> tuple[list[list[str]], list[str]]:
    """Draws of sequences to fit on, and those to measure on."""
    fitted, held_out = sequences(FILES["fitted"]), sequences(FILES["held_out"])
    known = set(fitted)
    order = torch.randperm(len(held_out), generator=generator(0, "held-out proteins")).tolist()
    tests = [held_out[i] for i in order if held_out[i] not in known][:TESTS]
    order = torch.randperm(len(fitted), generator=generator(0, "fitted proteins")).tolist()
    draws = [order[i * PROTEINS : (i + 1) * PROTEINS] for i in range(DRAWS)]
    return [[fitted[i] for i in draw] for draw in draws], tests


def models(names: list[str]) -> Record:
    """KL to the dense model at equal parameters, by metric and method."""
    draws, tests = proteins()
    found = {}
    for name in names:
        methods = MODELS[name]
        dense, architecture, _, digest, _ = load_dense(name)
        held_out = architecture.batches(tests)
        shown = architecture.calibration(held_out)
        records: list[Record] = []
        for draw, chosen in enumerate(draws):
            batches = architecture.calibration(architecture.batches(chosen))
            for ratio in RATIOS:
                for method in methods:
                    small, fvu = student(method, dense, architecture, batches, shown, ratio)
                    whole = compare(architecture, dense, small, held_out)
                    record = {"draw": draw, "ratio": ratio, "method": method, "layer_fvu": fvu}
                    record["parameters"] = sum(p.numel() for p in small.parameters())
                    records.append(record | {key: whole[key] for key in METRICS})
                    print(record, whole["logits_kl"], whole["hidden_fvu"], flush=True)
        pairs = [(ratio, m) for ratio in RATIOS for m in methods if m != "budget"]
        found[name] = {
            "sha256": digest,
            "perplexity": whole["perplexity_before"],
            "against_budget": [against(records, ratio, m) for ratio, m in pairs],
            "records": records,
        }
    return {"proteins": sizes(), "models": found}


def sizes() -> dict[str, int]:
    return dict(fitted=PROTEINS, held_out=TESTS, residues_at_most=RESIDUES, draws=DRAWS)


def sequences(path: Path) -> list[str]:
    """The starts of proteins of at least 60 residues, without unusual ones."""
    found = [p.sequence for p in read_fasta(path) if len(p.sequence) >= 60]
    return [s[:RESIDUES] for s in found if not set(s) - set(AMINO_ACIDS)]


def student(
    method: str,
    dense: nn.Module,
    architecture: Architecture,
    batches: list[Batch],
    shown: list[Batch],
    ratio: float,
) -> tuple[nn.Module, float | None]:
    """The compressed model and the mean FVU of its layers on the batches shown."""
    options: dict[str, Any] = {"ratio": ratio, "loss": None}
    sites = trace(dense, batches, find_sites(dense))
    if method.startswith("Fisher"):
        options |= {"loss": architecture.loss, "neurons": "neurons" in method}
        options["sequential"] = "sequential" in method
    elif method != "budget":
        options = {"ranks": uniform(sites, ratio), "loss": None}
    if method in BASELINES:
        return baseline_model(method, dense, batches, shown, sites, options["ranks"])
    small, report = compress_model(dense, batches, held_out=shown, **options)
    return small, report.mean_fvu


def uniform(sites: list[Site], ratio: float) -> dict[str, int | None]:
    """Ranks at the largest common share of the layers' parameters that fits the ratio."""

    def at(share: float) -> dict[str, int | None]:
        ranks = {s: max(1, int(share * s.parameters / (s.d_in + s.d_out))) for s in sites}
        return {s.name: r if r <= largest_rank(s.d_in, s.d_out) else None for s, r in ranks.items()}

    def spent(ranks: Mapping[str, int | None]) -> int:
        return sum(
            s.parameters if (r := ranks[s.name]) is None else r * (s.d_in + s.d_out) for s in sites
        )

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = spent(at(middle)) <= ratio * sum(s.parameters for s in sites)
        low, high = (middle, high) if fits else (low, middle)
    return at(low)


def baseline_model(
    method: str,
    model: nn.Module,
    batches: list[Batch],
    shown: list[Batch],
    sites: list[Site],
    ranks: Mapping[str, int | None],
) -> tuple[nn.Module, float]:
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
    losses = measure(model, students, shown, sites)
    return replaced(model, students), sum(x.fvu for x in losses.values()) / len(sites)


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


def frontier(names: list[str]) -> Record:
    """Bytes on disk, KL and hidden FVU of every way to make a model smaller."""
    draws, tests = proteins()
    found: dict[str, list[Record]] = {}
    for name in names:
        dense, architecture, *_ = load_dense(name)
        held_out = architecture.batches(tests)
        found[name] = []
        for draw, chosen in enumerate(draws):
            batches = architecture.calibration(architecture.batches(chosen))
            for form, small, size in forms(name, dense, architecture, batches):
                narrower = SMALLER[name] in form  # its hidden states have no counterpart
                measured = predictions if narrower else compare
                whole = measured(architecture, dense, small, held_out)
                record = {"draw": draw, "form": form, "bytes": size or bytes_of(small)}
                found[name].append(record | {key: whole[key] for key in METRICS})
                print(name, record, whole["logits_kl"]["value"], flush=True)
    return {"proteins": sizes(), "models": found}


def predictions(
    architecture: Architecture, dense: nn.Module, small: nn.Module, batches: list[Batch]
) -> Record:
    """KL and perplexity, as `compare`, of a model of another width; no hidden FVU."""
    rows = [masked_divergence(architecture, dense, small, batch, PHASES) for batch in batches]
    count, kl, _, nll = torch.cat(rows).sum(0).tolist()
    values = {"logits_kl": kl / count, "perplexity_after": float(np.exp(nll / count))}
    return {"hidden_fvu": None} | {key: {"value": value} for key, value in values.items()}


def times(names: list[str]) -> Record:
    """Milliseconds a forward pass of every form, beside the dense model, at batch 1 and 8."""
    draws, tests = proteins()
    found: dict[str, list[Record]] = {}
    for name in names:
        dense, architecture, *_ = load_dense(name)
        batches = architecture.calibration(architecture.batches(draws[0]))
        longest = max(tests, key=len)
        found[name] = []
        for form, small, _ in forms(name, dense, architecture, batches):
            for count in (1, 8):
                record = cost(dense, small, architecture.tokenise([longest] * count), rounds=30)
                found[name].append({"form": form, **record})
                print(name, form, count, record["before_ms"], record["after_ms"], flush=True)
    return {"models": found, "machine_dependent": ["models"]}


def shape() -> Record:
    """Bytes and milliseconds of the 650M shape at batch 1 and 4: random weights, ranks uniform."""
    dense = random_650m()
    sites = [s for s in find_sites(dense) if s.d_out > 1]
    numbers = sum(p.numel() for p in dense.parameters())

    def eight(layer: Any) -> QuantLinear:
        return QuantLinear.of(layer.weight, layer.bias)

    def low_rank(site: Site, ratio: float, int8: bool) -> nn.Module:
        rank = round(ratio * site.d_in * site.d_out / (site.d_in + site.d_out))
        draw = generator(rank, site.name)
        A = torch.randn(rank, site.d_in, generator=draw) / 30
        small = LowRankLinear(A, torch.randn(site.d_out, rank, generator=draw) / 30, site.bias)
        return in_place(eight(small.A), eight(small.B)) if int8 else small

    makers: dict[str, Callable[[Site], nn.Module]] = {"dense, int8": lambda s: eight(s.module)}
    for ratio in (0.5, 0.3):
        for form, int8 in (("float16", False), ("int8", True)):
            name = f"low rank {ratio:g}, {form}"
            makers[name] = partial(low_rank, ratio=ratio, int8=int8)
    length = 128
    tokens = torch.randint(4, 24, (4, length + 2), generator=generator(0, "tokens"))
    found: list[Record] = [{"form": "dense, float16", "bytes": 2 * numbers}]
    for form, make in makers.items():
        made = {s.name: make(s) for s in sites}
        rest = numbers - sum(p.numel() for s in sites for p in s.module.parameters())
        size = 2 * rest + sum(map(module_bytes, made.values())) // (1 if "int8" in form else 2)
        small = on_integers(replaced(dense, made))
        for count in (1, 4):
            record = cost(dense, small, tokens[:count], rounds=3)
            found.append({"form": form, "bytes": size, **record})
            print(form, size, count, record["before_ms"], record["after_ms"], flush=True)
    return {"length": length, "parameters": numbers, "forms": found, "machine_dependent": ["forms"]}


def bytes_of(model: nn.Module) -> int:
    """Of the weights as they are saved."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        return (Path(folder) / WEIGHTS).stat().st_size


def forms(
    name: str, dense: nn.Module, architecture: Architecture, batches: list[Batch]
) -> Iterator[tuple[str, nn.Module, int | None]]:
    """Name, model and, of one that is simulated, bytes."""
    yield "dense, float16", copy.deepcopy(dense), None
    for bits in (8, 4):
        yield f"dense, int{bits}", quantise_model(dense, batches, bits)[0], None
    yield "dense, int3", *three_bits(dense, batches)
    for ratio, neurons in itertools.product((0.5, 0.3, 0.1), (False, True)):
        small, _ = compress_model(dense, batches, ratio, loss=architecture.loss, neurons=neurons)
        form = f"{'neurons and ' * neurons}low rank {ratio:g}"
        yield f"{form}, float16", halved(small), None
        for bits in (8, 4):
            yield f"{form}, int{bits}", quantise_model(small, batches, bits)[0], None
    yield f"{SMALLER[name]}, float16", load_dense(SMALLER[name]).model, None
    yield "best block dropped, float16", block_dropped(dense, architecture, batches), None
    yield "half of the neurons, float16", neurons_kept(dense, architecture, batches), None


def halved(model: nn.Module) -> nn.Module:
    """The model in float32 with weights that float16 holds."""
    return copy.deepcopy(model).half().float()


def three_bits(dense: nn.Module, batches: list[Batch]) -> tuple[nn.Module, int]:
    """As `quantise_model`; there is no three-bit file, the bytes are 3 bits a weight and scales."""
    sites = trace(dense, batches, find_sites(dense))
    made, saved = {}, 0.0
    for statistics in collect(dense, batches, sites, inputs_only=True):
        m = statistics.moments
        second = m.covariance + m.mean.outer(m.mean)
        for site in statistics.sites:
            integers, scale = rounded(site.weight.double(), second, 3, GROUP)
            scale = scale.half().float().repeat_interleave(GROUP, 1)[:, : site.d_in]
            made[site.name] = linear(integers * scale, site.bias)
            saved += site.parameters * (2 - 3 / 8 - 2 / GROUP)
    return replaced(dense, made), round(bytes_of(dense) - saved)


def block_dropped(dense: Any, architecture: Architecture, batches: list[Batch]) -> nn.Module:
    """Without the one block whose absence raises the KL on the fitted proteins least."""
    found = []
    for i in range(len(dense.layers)):
        small = copy.deepcopy(dense)
        del small.layers[i]
        small.depth -= 1
        kl = compare(architecture, dense, small, batches[:1], passes=1)["logits_kl"]["value"]
        found.append((kl, i, small))
    return min(found)[2]


def neurons_kept(
    dense: nn.Module, architecture: Architecture, batches: list[Batch], share: float = 0.5
) -> nn.Module:
    """MLPs of fewer neurons, whatever the rest of the model could give."""
    sites = trace(dense, batches, find_sites(dense))
    mlps = find_mlps(dense, batches, sites)
    lasts = [mlp[-1] for mlp in mlps.values()]
    parts: dict[str, nn.Module] = {}
    for found in collect(dense, batches, lasts, inputs_only=True, loss=architecture.loss):
        (site,) = found.sites
        neurons = selected(site, found.moments, found.metrics[site.name])
        parts |= PrunedMLP(mlps[site.name], *neurons.kept(round(share * site.d_in))).layers()
    return replaced(dense, parts)


LAYERS: dict[str, Callable[[], Record]] = {
    "cells": cells,
    "prior": prior,
    "large": large,
    "shape": shape,
}
WHOLE: dict[str, Callable[[list[str]], Record]] = {
    "models": models,
    "frontier": frontier,
    "times": times,
}
UNASKED = ("large", "shape", "times")


def main(arguments: list[str]) -> None:
    global DRAWS
    DRAWS = next((int(a[6:]) for a in arguments if a.startswith("draws=")), DRAWS)
    names = [a for a in arguments if a in MODELS] or list(MODELS)
    parts = [a for a in arguments if a not in MODELS and not a.startswith("draws=")]
    if unknown := set(parts) - {*LAYERS, *WHOLE}:
        known = ", ".join([*LAYERS, *WHOLE, *MODELS])
        raise SystemExit(f"parts and models out of {known} required, got {', '.join(unknown)}")
    for part in parts or [p for p in (*LAYERS, *WHOLE) if p not in UNASKED]:
        start = time.perf_counter()
        found = LAYERS[part]() if part in LAYERS else WHOLE[part](names)
        seconds = time.perf_counter() - start
        record: dict[str, Any] = {"schema": SCHEMA}
        if RESULT.is_file():
            record = read_json(RESULT, SCHEMA)
        machine = [*found.get("machine_dependent", []), "environment", "part_seconds"]
        found |= {"environment": environment("cpu"), "part_seconds": seconds}
        if part in WHOLE:
            found["models"] = record.get(part, {}).get("models", {}) | found["models"]
        record[part] = found | {"machine_dependent": machine}
        record["data"] = {key: {"sha256": sha256(path)} for key, path in FILES.items()}
        write_json(RESULT, record)
        if "frontier" in record:
            draw_frontier(record)
        print(f"{part}: {seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
