"""Train, measure and use the nano family: small models of ESM-2's architecture, not ESM-2.

    python -m benchmarks.nano train nano-64 work/  # one size; resumable; models/nano-64.pt
    python -m benchmarks.nano evaluate             # held-out perplexity: models/nano.json
    python -m benchmarks.nano_deeploc              # locations by a linear probe
    python -m benchmarks.nano card                 # models/README.md from the two
    python -m benchmarks.nano embed work/          # embeddings_{train,val}.pt, by the largest

The proteins and the split are those of `benchmarks.nano_data` and need the shared data folder.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import nano_additive, nano_deeploc
from benchmarks.nano_data import input_hashes, split
from benchmarks.nano_perplexity import masked_losses
from distil_rank.core.intervals import bootstrap_counts, percentile_interval
from distil_rank.core.randomness import generator
from distil_rank.core.records import (
    ROOT,
    config_record,
    environment,
    interval,
    read_json,
    sha256,
    write_json,
    write_text,
)
from distil_rank.proteins import command_embed, command_pretrain
from distil_rank.proteins.checkpoints import load_model
from distil_rank.proteins.command_pretrain import Config
from distil_rank.proteins.fasta import AMINO_ACIDS, Protein, write_fasta
from distil_rank.proteins.masked import logits_at
from distil_rank.proteins.pretrain import new_model

MODELS = ROOT / "models"
TRAIN = Path("train.fasta.gz")
SIZES = {
    f"nano-{width}": Config(
        TRAIN,
        Path(f"nano-{width}.pt"),
        n_layer=4,
        n_head=heads,
        n_embd=width,
        tokens=8e6,
        batch_tokens=batch,
        max_length=512,
        learning_rate=rate,
        dtype="bfloat16" if width == 256 else "float32",
        device="cpu",
    )
    for width, heads, batch, rate in (
        (64, 4, 2048, 3e-3),
        (128, 8, 2048, 2e-3),
        (256, 8, 4096, 2e-3),
    )
}


def train(name: str, folder: Path) -> None:
    if not (folder / TRAIN).exists():
        write_fasta(folder / TRAIN, split().train)
    config = SIZES[name]
    command_pretrain.run(replace(config, fasta=folder / TRAIN, out=folder / config.out))
    shutil.copy(folder / config.out, MODELS / config.out)


def evaluate() -> None:
    """Perplexity of each size on the same masked residues: differences are paired."""
    parts = split()
    sequences = [protein.sequence[:512] for protein in parts.held_out[::4]]
    draws = bootstrap_counts(len(sequences), 1000, generator(0, "bootstrap")).numpy()
    simple = nano_additive.train([protein.sequence for protein in parts.train], SIZES["nano-64"])
    additive, predicted = masked_losses(simple, sequences)
    models, before = {}, None
    untrained = {
        name: new_model(c.n_layer, c.n_embd, c.n_head, c.seed) for name, c in SIZES.items()
    }
    for name, config in SIZES.items():
        model = load_model(name, head=True).model
        sums, counts = masked_losses(partial(logits_at, model), sequences)
        trained_way, of = masked_losses(partial(logits_at, model), sequences, changed=(0.8, 0.1))
        untrained_sums, _ = masked_losses(
            partial(logits_at, untrained[name].eval()), sequences[::10]
        )
        over_additive = np.exp((draws @ (sums - additive)) / (draws @ counts))
        sampled = (draws @ sums) / (draws @ counts)
        value = float(np.exp(sums.sum() / counts.sum()))
        card = {
            "sha256": sha256(MODELS / f"{name}.pt"),
            "parameters": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
            "config": config_record(config),
            "perplexity": interval(value, *percentile_interval(np.exp(sampled)), False),
            "perplexity_80_10_10": float(np.exp(trained_way.sum() / of.sum())),
            "perplexity_over_additive": interval(
                float(np.exp((sums - additive).sum() / counts.sum())),
                *percentile_interval(over_additive),
                False,
            ),
            "perplexity_untrained": float(np.exp(untrained_sums.sum() / counts[::10].sum())),
        }
        if before is not None:
            ratio = float(np.exp((sums - before).sum() / counts.sum()))
            drawn = np.exp((draws @ (sums - before)) / (draws @ counts))
            card["perplexity_over_next_smaller"] = interval(
                ratio, *percentile_interval(drawn), False
            )
        models[name], before = card, sums
        print(name, card["perplexity"], card.get("perplexity_over_next_smaller"), flush=True)
    record = {
        "schema": "nano/1",
        "label": "nano: small models of the ESM-2 architecture trained on public proteins;"
        " not ESM-2",
        "data": {
            "inputs_sha256": input_hashes(),
            "heldout_list_sha256": sha256(MODELS / "nano-heldout.txt"),
            "train_proteins": len(parts.train),
            "train_residues": sum(len(protein.sequence) for protein in parts.train),
            "heldout_proteins": len(parts.held_out),
            "heldout_clusters": len(set(parts.clusters)),
            "measured_proteins": len(sequences),
            "dropped_as_related_to_train": parts.dropped,
            "masked_residues": int(counts.sum()),
            "unigram": unigram(parts.train, sequences),
            "additive": float(np.exp(additive.sum() / predicted.sum())),
        },
        "models": models,
        "environment": environment(),
        "machine_dependent": ["environment"],
    }
    write_json(MODELS / "nano.json", record)


def unigram(train: list[Protein], held_out: list[str]) -> float:
    """Perplexity of predicting every residue from the training proteins' amino-acid frequencies."""

    def counts(sequences: Iterable[str]) -> np.ndarray:
        return np.array([[s.count(a) for a in AMINO_ACIDS] for s in sequences]).sum(0)

    frequencies, seen = counts(protein.sequence for protein in train), counts(held_out)
    return float(np.exp(-(seen * np.log(frequencies / frequencies.sum())).sum() / seen.sum()))


CARD = Path(__file__).with_name("nano_card.md")  # its text, figures to be filled in


def card() -> None:
    """models/README.md: a function of models/nano.json and the record of `nano_deeploc`."""
    record, probe = (
        read_json(MODELS / "nano.json", "nano/1"),
        read_json(nano_deeploc.OUT, nano_deeploc.SCHEMA),
    )
    found = probe["results"]

    def cell(metric: dict | None, digits: int) -> str:
        return (
            "{value:.{0}f} ({low:.{0}f} to {high:.{0}f})".format(digits, **metric) if metric else ""
        )

    rows = [
        f"| {name} | {m['config']['n_layer']} x {m['config']['n_embd']} "
        f"| {m['parameters']:,} | {m['config']['tokens']:,.0f} "
        f"| {cell(m['perplexity'], 2)} | {cell(m.get('perplexity_over_next_smaller'), 4)} "
        f"| {cell(m['perplexity_over_additive'], 4)} "
        f"| {m['perplexity_80_10_10']:.2f} | {m['perplexity_untrained']:.1f} |"
        for name, m in record["models"].items()
    ]
    locations = {
        "classes": len(probe["data"]["train_and_test_by_class"]),
        "n_test": probe["n_test"],
        "accuracies": ", ".join(f"{name} {cell(found[name]['accuracy'], 3)}" for name in found),
        "above": cell(found["nano-256"]["accuracy_above_composition"], 3),
    }
    text = CARD.read_text().format(
        rows="\n".join(rows), verdict=size_verdict(record["models"]), **record["data"], **locations
    )
    write_text(MODELS / "README.md", text)


def size_verdict(models: dict) -> str:
    """Whether perplexity falls with size, in words, from the intervals of the paired ratios."""
    steps = []
    for smaller, (name, model) in zip(models, list(models.items())[1:]):
        ratio = model["perplexity_over_next_smaller"]
        word = (
            "falls"
            if ratio["high"] < 1
            else "rises"
            if ratio["low"] > 1
            else "cannot be told apart"
        )
        steps.append(f"{word} from {smaller} to {name} ({ratio['value'] - 1:+.2%})")
    return f"perplexity {', '.join(steps)}."


def embed(folder: Path) -> None:
    """Held-out proteins of up to 1022 residues, by the largest model, split by clusters."""
    fasta, store = folder / "heldout.fasta.gz", folder / "store"
    write_fasta(fasta, (protein for protein in split().held_out if len(protein.sequence) <= 1022))
    options: dict[str, Any] = {"store_dtype": "float16", "split": 0.2, "device": "cpu"}
    command_embed.run(command_embed.Config(fasta, "nano-256", store, **options))
    for name in ("train.pt", "val.pt", "train.txt", "val.txt"):  # the text: which protein a row is
        shutil.copy(store / f"embeddings_{name}", ROOT)
    card = json.loads((store / "embeddings.json").read_text())
    card["source"] = (
        "mean-pooled embeddings of held-out proteins (Pfam domains, Swiss-Prot, DeepLoc)"
    )
    card |= {
        "data": input_hashes(),
        "note": "real proteins held out from the training of nano-256 (models/README.md)",
    }
    write_json(ROOT / "embeddings.json", card)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "train":
        train(arguments[0], Path(arguments[1]))
    elif command == "evaluate":
        evaluate()
    elif command == "card":
        card()
    elif command == "embed":
        embed(Path(arguments[0]))
    else:
        sys.exit(__doc__)
