"""Train, measure and use the nano family: small models of the ESM-2 architecture on real proteins (not ESM-2).

    python -m benchmarks.nano train nano-64 work/        # one size; resumable; writes models/nano-64.pt
    python -m benchmarks.nano evaluate                   # held-out perplexity by size: models/nano.json
    python -m benchmarks.nano embed work/                # embeddings_{train,val}.pt of held-out proteins, by the largest

The proteins and the split are those of `benchmarks.nano_data` and need the shared data folder.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.nano_data import input_hashes, split
from distil_rank.proteins import embeddings, pretrain
from distil_rank.proteins.fasta import write_fasta
from distil_rank.proteins.masked import load_checkpoint, masked_losses, new_model
from distil_rank.proteins.pretrain import Config
from distil_rank.randomness import generator
from distil_rank.records import ROOT, config_record, environment, interval, sha256, write_json
from distil_rank.statistics.intervals import bootstrap_counts, percentile_interval

MODELS = ROOT / "models"
TRAIN = Path("train.fasta.gz")
SIZES = {
    "nano-64": Config(TRAIN, Path("nano-64.pt"), layers=4, width=64, heads=4, tokens=8e6, learning_rate=3e-3),
    "nano-128": Config(TRAIN, Path("nano-128.pt"), layers=6, width=128, heads=4, tokens=3e6),
    "nano-256": Config(
        TRAIN, Path("nano-256.pt"), layers=6, width=256, heads=4, tokens=3e6, crop=192, learning_rate=1e-3, bf16=True
    ),
}


def train(name: str, folder: Path) -> None:
    if not (folder / TRAIN).exists():
        write_fasta(folder / TRAIN, split().train)
    config = SIZES[name]
    pretrain.run(replace(config, fasta=folder / TRAIN, out=folder / config.out))
    shutil.copy(folder / config.out, MODELS / config.out)


def evaluate() -> None:
    """Perplexity of each size on the same masked residues, so that differences between sizes are paired."""
    parts = split()
    sequences = [protein.sequence for protein in parts.held_out]
    draws = bootstrap_counts(len(sequences), 1000, generator(0, "bootstrap")).numpy()
    models, before = {}, None
    untrained = {name: new_model(c.layers, c.width, c.heads, c.seed) for name, c in SIZES.items()}
    for name, config in SIZES.items():
        model = load_checkpoint(MODELS / f"{name}.pt")
        sums, counts = masked_losses(model, sequences)
        untrained_sums, _ = masked_losses(untrained[name].eval(), sequences[::10])
        sampled = (draws @ sums) / (draws @ counts)
        value = float(np.exp(sums.sum() / counts.sum()))
        card = {
            "sha256": sha256(MODELS / f"{name}.pt"),
            "parameters": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
            "config": config_record(config),
            "perplexity": interval(value, *percentile_interval(np.exp(sampled)), False),
            "perplexity_untrained": float(np.exp(untrained_sums.sum() / counts[::10].sum())),
        }
        if before is not None:
            ratio = float(np.exp((sums - before).sum() / counts.sum()))
            drawn = np.exp((draws @ (sums - before)) / (draws @ counts))
            card["perplexity_over_next_smaller"] = interval(ratio, *percentile_interval(drawn), False)
        models[name], before = card, sums
        print(name, card["perplexity"], card.get("perplexity_over_next_smaller"), flush=True)
    record = {
        "schema": "nano/1",
        "label": "nano: small models of the ESM-2 architecture trained on public proteins; not ESM-2",
        "data": {
            "inputs_sha256": input_hashes(),
            "heldout_list_sha256": sha256(MODELS / "nano-heldout.txt"),
            "train_proteins": len(parts.train),
            "train_residues": sum(len(protein.sequence) for protein in parts.train),
            "heldout_proteins": len(sequences),
            "heldout_clusters": len(set(parts.clusters)),
            "dropped_as_related_to_train": parts.dropped,
            "masked_residues": int(counts.sum()),
        },
        "models": models,
        "environment": environment(),
        "machine_dependent": ["environment"],
    }
    write_json(MODELS / "nano.json", record)


def embed(folder: Path) -> None:
    """Held-out proteins of up to 1022 residues, by the largest model, split by clusters; copied to the top level."""
    fasta, store = folder / "heldout.fasta.gz", folder / "store"
    write_fasta(fasta, (protein for protein in split().held_out if len(protein.sequence) <= 1022))
    embeddings.run(embeddings.Config(fasta, "nano-256", store, dtype="float16", split=0.2))
    for name in ("embeddings_train.pt", "embeddings_val.pt"):
        rows = torch.load(store / name, weights_only=True).clone()
        temporary = ROOT / f"{name}.tmp{os.getpid()}"
        torch.save(rows, temporary)
        temporary.replace(ROOT / name)
    card = json.loads((store / "embeddings.json").read_text())
    card |= {"data": input_hashes(), "note": "real proteins held out from the training of nano-256 (models/README.md)"}
    write_json(ROOT / "embeddings.json", card)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "train":
        train(arguments[0], Path(arguments[1]))
    elif command == "evaluate":
        evaluate()
    elif command == "embed":
        embed(Path(arguments[0]))
    else:
        sys.exit(__doc__)
