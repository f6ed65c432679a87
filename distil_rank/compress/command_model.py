"""Make a whole protein language model smaller, and say what was lost.

    distil-rank compress model nano-64 --fasta proteins.fasta --ratio 0.5 --out small/
    distil-rank compress model gpt2_folder/ --fasta proteins.fasta --ratio 0.5 \
        --sequential --recover 300 --merge --out small/

Every layer is fitted in the metric of what the model makes of its output: the likelihood's Fisher
matrix, or the squared error of the hidden states of an encoder without a head. An MLP may lose
neurons instead of rank, where that loses less. MODEL is a name (nano-64, esm2_t6_8M_UR50D), a
fair-esm .pt file or a Hugging Face folder. The output folder has the weights (model.safetensors, as
narrow as the source's), certificate.json, report.json, report.png and a README that loads them:
`distil_rank.load("small/")` gives a torch module. Layers whose factors would not be smaller stay
dense.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import nn

from distil_rank.compress.calibration import collect, load_prior, save_prior
from distil_rank.compress.dense_models import Dense, as_narrow_as, load_dense
from distil_rank.compress.evaluate import compare, cost, mutation_effects
from distil_rank.compress.export import save_merged, save_onnx
from distil_rank.compress.models import compress_model
from distil_rank.compress.neurons import find_mlps
from distil_rank.compress.quantise import quantise_model
from distil_rank.compress.recover import recover
from distil_rank.compress.report import SCHEMA, draw, readme, summary
from distil_rank.compress.sites import Batch, find_sites, trace
from distil_rank.compress.storage import WEIGHTS, require_other_folder, save
from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError, at_least
from distil_rank.core.randomness import generator
from distil_rank.core.records import (
    Record,
    config_record,
    environment,
    require_writable,
    sha256,
    shown_path,
    write_json,
)
from distil_rank.core.resume import Checkpoint
from distil_rank.proteins.fasta import clean_proteins, read_fasta
from distil_rank.proteins.variants import Assay, read_assays


@dataclass(frozen=True)
class Config:
    model: tyro.conf.Positional[str]  # a model by name, file or folder
    fasta: Path  # FASTA of proteins to work on
    ratio: float  # parameters of the chosen layers after / before
    out: Path  # where to write
    held_out_fasta: Path | None = None  # FASTA to measure on, instead of a share of --fasta
    held_out: float = 0.1  # share of the proteins kept aside
    max_length: int = 1022  # longest protein in residues
    sequential: bool = False  # fit each block to what the compressed blocks before it do
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone
    recover: int = 0  # steps of distillation of the factors afterwards
    int8: bool = False  # eight-bit weights
    int4: bool = False  # four-bit weights
    prior: Path | None = None  # moments of other proteins, to blend in where they help
    moments_out: Path | None = None  # also write the model's moments, to be somebody's --prior
    dms: Path | None = None  # folder of mutation assays (NAME.csv with NAME.fasta): Spearman
    onnx: bool = False  # also write model.onnx
    merge: bool = False  # also write merged/, a dense Hugging Face checkpoint
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one
    seed: int = 0  # of everything random


def run(config: Config) -> None:
    """Compress a model; nothing is written before the whole request was checked."""
    started = time.perf_counter()
    device = pick_device(config.device)
    dense, assays, fitted, held_out = checked(config, device)
    model, architecture = dense.model, dense.architecture
    raw, tests = (architecture.batches(part, device) for part in (fitted, held_out))
    batches = architecture.calibration(raw)
    prior = None if config.prior is None else load_prior(config.prior, device)
    out = config.out
    require_writable(out if out.exists() else out.absolute().parent)
    checkpoint = recovery_checkpoint(config, dense, fitted) if config.recover else None
    write_moments(config, model, batches)
    small, report = compress_model(
        *(model, batches, config.ratio),
        exclude=config.exclude,
        held_out=architecture.calibration(tests),
        loss=architecture.loss,
        sequential=config.sequential,
        prior=prior,
    )
    record: Record = {"schema": SCHEMA, "compression": report.record()}
    if checkpoint is not None:
        record["before_recovery"] = compare(architecture, model, small, tests, seed=config.seed)
        better, losses = recover(
            *(architecture, model, small, raw, config.recover), config.seed, checkpoint
        )
        record |= {"recovery_loss": losses, "recovery_kept": better is not small}
        small = better
    small = as_narrow_as(model, small)
    if bits := 8 * config.int8 or 4 * config.int4:
        small, lost = quantise_model(small, batches, bits)
        record["quantisation"] = {"bits": bits, "loss": lost}
    record["evaluation"] = compare(architecture, model, small, tests, seed=config.seed)
    record["cost"] = cost(model, small, max(tests, key=len))
    if assays:
        record["mutations"] = mutation_effects(architecture, model, small, assays)
    data = {"source": shown_path(config.fasta), "sha256": sha256(config.fasta)}
    record |= {
        "seconds": time.perf_counter() - started,
        "config": config_record(config),
        "data": {**data, "n_train": len(fitted), "n_val": len(held_out)},
        "teacher": {"source": shown_path(dense.source), "sha256": dense.sha256},
        "seeds": [config.seed],
        "environment": environment(device),
        "machine_dependent": ["cost", "seconds", "environment"],
    }
    text = readme(Path(config.model).name, architecture.class_name, record, out)
    save(small, out, architecture, certificate=record["compression"], readme=text)
    size = (out / WEIGHTS).stat().st_size
    record["cost"] |= {"bytes_before": dense.bytes, "bytes_after": size}
    write_json(out / "report.json", record)
    draw(out)
    if config.merge:
        save_merged(small, architecture, out / "merged")
    if config.onnx:
        shown = (min(held_out, key=len), max(held_out, key=len))
        save_onnx(small.cpu(), architecture, shown, out / "model.onnx")
    print(summary(record, out))


def checked(
    config: Config, device: torch.device
) -> tuple[Dense, list[Assay], list[str], list[str]]:
    """The model, the assays, the proteins to fit on and those to measure on; InputError."""
    if not 0 < config.ratio <= 1:
        raise InputError(f"--ratio must be above 0 and at most 1, got {config.ratio}")
    if not 0 < config.held_out < 1:
        raise InputError(f"--held-out must be between 0 and 1, got {config.held_out}")
    if config.int8 and config.int4:
        raise InputError("--int8 or --int4 required, got both; leave one out")
    at_least(0, recover=config.recover)
    at_least(1, max_length=config.max_length)
    if config.moments_out is not None:
        require_writable(config.moments_out.absolute().parent)
        if config.moments_out.is_dir():
            raise InputError(f"a file required for --moments-out, {config.moments_out} is a folder")
    dense = load_dense(config.model, device)
    require_other_folder(config.out, dense.source)
    architecture = dense.architecture
    assays = []
    if config.dms is not None:
        if architecture.task != "masked" or not architecture.is_esm:
            raise InputError(
                "--dms needs an ESM-2 with its language-model head,"
                f" got {architecture.class_name}; leave it out"
            )
        assays = read_assays(config.dms, least=3)
    return dense, assays, *proteins(config)


def proteins(config: Config) -> tuple[list[str], list[str]]:
    """Sequences to fit on and to measure on, cut at --max-length; none is in both."""
    fitted = read(config.fasta, config.max_length)
    if config.held_out_fasta is not None:
        found, known = read(config.held_out_fasta, config.max_length), set(fitted)
        held_out = [sequence for sequence in found if sequence not in known]
        if len(held_out) < len(found):
            note(f"{len(found) - len(held_out)} held-out proteins left out: also fitted on")
    else:
        unique = list(dict.fromkeys(fitted))
        if len(unique) < len(fitted):
            note(f"{len(fitted) - len(unique)} proteins left out: equal to others")
        draws = generator(config.seed, "held-out proteins")
        order = torch.randperm(len(unique), generator=draws).tolist()
        count = round(config.held_out * len(unique))
        fitted, held_out = ([unique[i] for i in sorted(p)] for p in (order[count:], order[:count]))
    if not fitted or not held_out:
        raise InputError(
            "at least one protein to fit and another one to hold out required,"
            f" got {len(fitted)} and {len(held_out)}; give more"
        )
    return fitted, held_out


def read(path: Path, limit: int) -> list[str]:
    found = [p.sequence for p in clean_proteins(list(read_fasta(path)), note)]
    longer = sum(len(sequence) > limit for sequence in found)
    if longer:
        note(f"{longer} of {len(found)} proteins cut at {limit} residues")
    return [sequence[:limit] for sequence in found]


def note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def write_moments(config: Config, model: nn.Module, batches: list[Batch]) -> None:
    """The dense model's moments on these proteins, for use as a prior elsewhere, if asked for."""
    if config.moments_out is None:
        return
    sites = trace(model, batches, find_sites(model, exclude=config.exclude))
    mlps = find_mlps(model, batches, sites)
    found = collect(model, batches, [replace(s, of_inputs=s.name in mlps) for s in sites])
    save_prior(config.moments_out, found, model=Path(config.model).name)


def recovery_checkpoint(config: Config, dense: Dense, fitted: list[str]) -> Checkpoint:
    """Where --recover is saved now and then; InputError where another request left its state."""
    path = config.out.absolute().parent / f".{config.out.name}.recovery.pt"
    prior = None if config.prior is None else sha256(config.prior)
    found = Checkpoint(path, config_record(config), dense.sha256, fitted, prior)
    found.load()
    return found
