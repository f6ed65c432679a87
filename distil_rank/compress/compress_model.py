"""`distil-rank compress` for a model: checkpoint and proteins in; weights, certificate and report out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distil_rank.core.errors import InputError
from distil_rank.compress.architectures import Architecture
from distil_rank.compress.calibration import collect
from distil_rank.compress.compress import Config, unused
from distil_rank.compress.dense_models import load_dense, weights_file
from distil_rank.compress.evaluate import compare, cost, mutation_effects, read_assays
from distil_rank.compress.models import compress_model
from distil_rank.core.prior import load_prior, save_prior
from distil_rank.compress.quantise import quantise_model
from distil_rank.compress.recover import recover
from distil_rank.compress.sites import Batch, find_sites, trace
from distil_rank.compress.storage import save, save_merged
from distil_rank.core.randomness import generator
from distil_rank.core.records import config_record, environment, require_writable, sha256, shown_path, write_json

SCHEMA = "distil-rank/compressed-model/1"
HEAD_FLAGS = ("key", "activation", "val", "labels", "val_labels", "rank", "fvu", "speedup", "bytes", "metric", "onnx")


def run_model(config: Config) -> None:
    unused(config, HEAD_FLAGS, "with --calibration, they are for layers and heads")
    if config.ratio is None:
        raise InputError("--ratio required for a model, got none; --ratio 0.5 halves its linear layers")
    if not 0 < config.ratio <= 1:
        raise InputError(f"--ratio must be above 0 and at most 1, got {config.ratio}")
    if config.recover < 0 or config.max_residues < 1:
        raise InputError(
            f"--recover >= 0 and --max-residues >= 1 required, got {config.recover} and {config.max_residues}"
        )
    dense, architecture = load_dense(config.target)
    if config.merge and architecture.kind != "transformers":
        raise InputError("--merge needs a Hugging Face model, got a fair-esm checkpoint; leave it out")
    if config.sensitivity and not architecture.has_logits:
        raise InputError(f"--sensitivity needs a model with a language-model head, got {architecture.class_name}")
    if config.dms is not None:
        if architecture.causal or not architecture.has_logits:
            raise InputError(f"--dms needs a masked language model, got {architecture.class_name}; leave it out")
        read_assays(config.dms)
    fitted, held_out = proteins(config)
    raw, tests = architecture.batches(fitted), architecture.batches(held_out)
    batches = architecture.calibration(dense, raw)
    prior = None if config.prior is None else load_prior(config.prior)
    out = config.out
    require_writable(out.absolute().parent)
    if out.exists():
        require_writable(out)

    started = time.perf_counter()
    if config.moments_out is not None:
        write_moments(config, dense, batches)
    small, report = compress_model(
        *(dense, batches, config.ratio),
        method=config.method,
        unit=config.unit,
        include=config.include,
        exclude=config.exclude,
        held_out=architecture.calibration(dense, tests),
        loss=architecture.loss if config.sensitivity else None,
        sequential=config.sequential,
        prior=prior,
    )
    record: dict[str, Any] = {"schema": SCHEMA, "compression": report.record()}
    if config.recover:
        checkpoint = out.absolute().parent / f".{out.name}.recovery.safetensors"
        record["before_recovery"] = compare(architecture, dense, small, tests, seed=config.seed)
        start = small
        small, losses = recover(
            architecture, dense, small, raw, config.recover, seed=config.seed, checkpoint=checkpoint
        )
        record["recovery_loss"] = losses
        record["recovery_kept"] = any(
            not torch.equal(a, b) for a, b in zip(start.state_dict().values(), small.state_dict().values())
        )
    if config.int8:
        small, certificates = quantise_model(small, batches)
        record["int8"] = {name: vars(c) for name, c in certificates.items()}
    record["evaluation"] = compare(architecture, dense, small, tests, seed=config.seed)
    record["cost"] = cost(architecture, dense, small, max(tests, key=len))
    if config.dms is not None:
        record["mutations"] = mutation_effects(architecture, {"before": dense, "after": small}, config.dms)
    assert config.calibration is not None
    source = weights_file(config.target)
    record |= {
        "seconds": time.perf_counter() - started,
        "config": config_record(config),
        "data": {
            "source": shown_path(config.calibration),
            "sha256": sha256(config.calibration),
            "n_train": len(fitted),
            "n_val": len(held_out),
        },
        "teacher": {"source": shown_path(source), "sha256": sha256(source)},
        "seeds": [config.seed],
        "environment": environment(),
        "machine_dependent": ["cost", "seconds", "environment"],
    }
    save(small, out, architecture, certificate=record["compression"], readme=readme(config, architecture, record))
    write_json(out / "report.json", record)
    from distil_rank.compress.model_report import draw

    draw(out)
    if config.merge:
        save_merged(small, architecture, out / "merged")
    print(summary(record, out))


def proteins(config: Config) -> tuple[list[str], list[str]]:
    """Sequences to fit on and to measure on, cut at --max-residues; InputError."""
    assert config.calibration is not None
    sequences = read(config.calibration, config.max_residues)
    if config.evaluation is not None:
        return sequences, read(config.evaluation, config.max_residues)
    count = round(config.held_out * len(sequences))
    if count < 1 or count == len(sequences):
        raise InputError(
            f"at least one protein to fit and one to hold out required, got {len(sequences)} in all; give more"
        )
    order = torch.randperm(len(sequences), generator=generator(config.seed, "held-out proteins")).tolist()
    return [sequences[i] for i in sorted(order[count:])], [sequences[i] for i in sorted(order[:count])]


def read(path: Path, limit: int) -> list[str]:
    from distil_rank.proteins.fasta import clean_proteins, read_fasta

    found = list(clean_proteins(list(read_fasta(path)), lambda line: print(f"note: {line}", file=sys.stderr)))
    longer = sum(len(p.sequence) > limit for p in found)
    if longer:
        print(f"note: {longer} of {len(found)} proteins cut at {limit} residues", file=sys.stderr)
    return [p.sequence[:limit] for p in found]


def write_moments(config: Config, dense: nn.Module, batches: list[Batch]) -> None:
    """The dense model's moments on these proteins, for use as a prior elsewhere."""
    sites = find_sites(dense, config.include, config.exclude)
    calls = trace(dense, batches[0], sites)
    called = [s for s in sites if s.name in calls]
    found = {
        name: (statistics.side, statistics.moments)
        for part in collect(dense, batches, called, calls)
        for name, statistics in part.items()
    }
    assert config.moments_out is not None
    save_prior(config.moments_out, found, model=Path(config.target).name)


def readme(config: Config, architecture: Architecture, record: dict[str, Any]) -> str:
    evaluation = record["evaluation"]
    what = evaluation.get("perplexity_ratio")
    loss = f"perplexity x {what['value']:.4g}" if what else f"hidden FVU {evaluation['hidden_fvu']['value']:.3g}"
    return f"""{Path(config.target).name} with {record["compression"]["parameters_after"]} parameters, compressed by \
Distil-Rank; {loss} on {evaluation["proteins"]} held-out proteins (see report.json, report.png).
```python
import distil_rank
model = distil_rank.load("{config.out.name}")  # {architecture.class_name}, same inputs and outputs as before
```
"""


def summary(record: dict[str, Any], out: Path) -> str:
    compression, evaluation, money = record["compression"], record["evaluation"], record["cost"]
    dense = [x for x in compression["layers"] if x["rank"] is None]
    lines = [
        f"{len(compression['layers']) - len(dense)} layers low-rank, {len(dense)} dense"
        + "".join(f"\n  dense: {x['name']} ({x['note']})" for x in dense),
        f"parameters {compression['parameters']} -> {compression['parameters_after']}, bytes {money['bytes_before']} -> "
        f"{money['bytes_after']}, forward pass {money['speedup']['median']:.2f} x as fast",
        f"mean layer FVU {compression['mean_fvu']:.4g}, hidden-state FVU {evaluation['hidden_fvu']['value']:.4g}",
    ]
    if "perplexity_ratio" in evaluation:
        before, after, ratio = (evaluation[f"perplexity_{k}"] for k in ("before", "after", "ratio"))
        lines.append(
            f"{evaluation['kind']} {before['value']:.4g} -> {after['value']:.4g}, ratio {ratio['value']:.4g} "
            f"[{ratio['low']:.4g}, {ratio['high']:.4g}]; logits KL {evaluation['logits_kl']['value']:.4g} nats"
        )
    if "mutations" in record:
        found = record["mutations"]
        lines.append(f"DMS Spearman {found['mean_spearman_before']:.4f} -> {found['mean_spearman_after']:.4f}")
    return "\n".join([*lines, f"written to {out}"])
