"""Train, measure and use the nano family: small models of the ESM-2 architecture on real proteins (not ESM-2).

    python -m benchmarks.nano train nano-64 work/        # one size; resumable; writes models/nano-64.pt
    python -m benchmarks.nano evaluate                   # held-out perplexity by size: models/nano.json
    python -m benchmarks.nano_deeploc                    # locations by a linear probe: benchmarks/results/nano_deeploc.json
    python -m benchmarks.nano card                       # models/README.md from the two
    python -m benchmarks.nano embed work/                # embeddings_{train,val}.pt of held-out proteins, by the largest

The proteins and the split are those of `benchmarks.nano_data` and need the shared data folder.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import nano_additive, nano_deeploc
from benchmarks.nano_data import input_hashes, split
from distil_rank.proteins import embeddings, pretrain
from distil_rank.proteins.fasta import AMINO_ACIDS, Protein, write_fasta
from distil_rank.proteins.masked import load_checkpoint, logits_at, masked_losses, new_model
from distil_rank.proteins.pretrain import Config
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, config_record, environment, interval, read_json, sha256, write_json, write_text
from distil_rank.core.intervals import bootstrap_counts, percentile_interval

MODELS = ROOT / "models"
TRAIN = Path("train.fasta.gz")
SIZES = {
    f"nano-{width}": Config(
        TRAIN,
        Path(f"nano-{width}.pt"),
        layers=4,
        width=width,
        heads=heads,
        tokens=8e6,
        batch_tokens=batch,
        crop=512,
        learning_rate=rate,
        bf16=width == 256,
    )
    for width, heads, batch, rate in ((64, 4, 2048, 3e-3), (128, 8, 2048, 2e-3), (256, 8, 4096, 2e-3))
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
    sequences = [protein.sequence[:512] for protein in parts.held_out[::4]]
    draws = bootstrap_counts(len(sequences), 1000, generator(0, "bootstrap")).numpy()
    simple = nano_additive.train([protein.sequence for protein in parts.train], SIZES["nano-64"])
    additive, predicted = masked_losses(simple, sequences)
    models, before = {}, None
    untrained = {name: new_model(c.layers, c.width, c.heads, c.seed) for name, c in SIZES.items()}
    for name, config in SIZES.items():
        model = load_checkpoint(MODELS / f"{name}.pt")
        sums, counts = masked_losses(partial(logits_at, model), sequences)
        trained_way, of = masked_losses(partial(logits_at, model), sequences, changed=(0.8, 0.1))
        untrained_sums, _ = masked_losses(partial(logits_at, untrained[name].eval()), sequences[::10])
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
                float(np.exp((sums - additive).sum() / counts.sum())), *percentile_interval(over_additive), False
            ),
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
    """Perplexity of predicting every residue from the amino-acid frequencies of the training proteins."""

    def counts(sequences: Iterable[str]) -> np.ndarray:
        return np.array([[s.count(a) for a in AMINO_ACIDS] for s in sequences]).sum(0)

    frequencies, seen = counts(protein.sequence for protein in train), counts(held_out)
    return float(np.exp(-(seen * np.log(frequencies / frequencies.sum())).sum() / seen.sum()))


CARD = """\
# The nano family

Small protein language models with **ESM-2's architecture**, trained for this project on public proteins so that it runs
and is tested without a download. They are not ESM-2 and know far less: use them to try things, not for biology.

| model | shape | parameters | residues seen | perplexity (95 %) | over next smaller | over additive | 80/10/10 | untrained |
|---|---|---|---|---|---|---|---|---|
{rows}

* **Perplexity**, held out: exp of the mean cross-entropy of {masked_residues:,} masked residues (15 %, every one replaced by
  `<mask>`) in every fourth held-out protein ({measured_proteins:,}, their first 512 residues). Intervals: bootstrap over
  proteins; the ratios compare the same residues. Predicting with the frequencies of the 20 amino acids gives {unigram:.2f};
  *additive*, a model of the protein's composition and one weight for every letter at each of 24 neighbouring places,
  trained on the batches of nano-64 (`benchmarks/nano_additive.py`), {additive:.2f}. It is what attention must beat.
  *80/10/10*: the same where, as in training, a tenth of the predicted residues is shown, which flatters.
* **Size**: {verdict}
* **Against composition**: accuracy of a linear probe for the subcellular location ({classes} places) of {n_test:,} held-out
  DeepLoc proteins: {accuracies}.
  nano-256 above composition: {above}.
* **Data**: {train_proteins:,} distinct sequences with {train_residues:,} residues from Pfam domains (maalbadri/esm2_pfam, MIT),
  human, yeast and *E. coli* Swiss-Prot proteins (Wang-lab-UCSD/TUnA, MIT) and DeepLoc (HannesStark/protein-localization,
  MIT). {heldout_proteins:,} proteins of {heldout_clusters:,} clusters are held out: `nano-heldout.txt` lists what was not
  trained on, and {dropped_as_related_to_train:,} of the list, in one cluster with a
  trained protein, are not used for results (`distil_rank/proteins/splits.py`).
* **Training**: masked language modelling (15 %, 80/10/10), fair-esm's own `ESM2` class; Muon, and AdamW for what is no
  matrix of a layer; heads start at neighbours (`look_at_neighbours` in `distil_rank/proteins/masked.py`); one CPU thread each.
* **Format**: fair-esm checkpoints, float16, without contact regression. `distil-rank embed --model nano-256` finds them.
* **Made by** `python -m benchmarks.nano`; the figures stand in `nano.json`, those of locations in
  `benchmarks/results/nano_deeploc.json`.
"""


def card() -> None:
    """models/README.md: a pure function of models/nano.json and the record of `benchmarks.nano_deeploc`."""
    record, probe = read_json(MODELS / "nano.json", "nano/1"), read_json(nano_deeploc.OUT, nano_deeploc.SCHEMA)
    found = probe["results"]

    def cell(metric: dict | None, digits: int) -> str:
        return (
            f"{metric['value']:.{digits}f} ({metric['low']:.{digits}f} to {metric['high']:.{digits}f})"
            if metric
            else ""
        )

    rows = [
        f"| {name} | {m['config']['layers']} x {m['config']['width']} | {m['parameters']:,} | {m['config']['tokens']:,.0f} "
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
    text = CARD.format(rows="\n".join(rows), verdict=size_verdict(record["models"]), **record["data"], **locations)
    write_text(MODELS / "README.md", text)


def size_verdict(models: dict) -> str:
    """Whether perplexity falls with size, in words computed from the intervals of the paired ratios."""
    steps = []
    for smaller, (name, model) in zip(models, list(models.items())[1:]):
        ratio = model["perplexity_over_next_smaller"]
        word = "falls" if ratio["high"] < 1 else "rises" if ratio["low"] > 1 else "cannot be told apart"
        steps.append(f"{word} from {smaller} to {name} ({ratio['value'] - 1:+.2%})")
    return f"perplexity {', '.join(steps)}."


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
    card["source"] = "mean-pooled embeddings of held-out proteins (Pfam domains, Swiss-Prot, DeepLoc)"
    card |= {"data": input_hashes(), "note": "real proteins held out from the training of nano-256 (models/README.md)"}
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
