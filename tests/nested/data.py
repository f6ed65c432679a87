"""Embeddings that look like a model family's, and small proteins."""

from dataclasses import replace
from pathlib import Path

import torch

from distil_rank.core.randomness import generator
from distil_rank.nested import command_fit
from distil_rank.proteins.fasta import Protein, write_fasta
from tests.toys import toy_sequences


def family(rows=600, widths=(6, 10, 17), seed=0, dtype=torch.float64, noise=0.3):
    """Row-aligned embeddings with common causes, a large mean and one outlier feature."""
    draw, most = generator(seed, "family"), max(widths)
    latent = torch.randn(rows, most, generator=draw, dtype=torch.float64)
    latent *= torch.logspace(0, -1, most)
    raws = {}
    for i, k in enumerate(widths):
        mixing = torch.randn(most, k, generator=draw, dtype=torch.float64)
        own = torch.randn(rows, k, generator=draw, dtype=torch.float64)
        x = latent @ mixing + noise * own + 3
        x[:, 0] = x[:, 0] * 8 - 20
        raws["abcdefg"[i]] = x.to(dtype)
    return raws


def proteins(count=40, seed=0) -> list[Protein]:
    sequences = toy_sequences(count, seed, 8, 40)
    return [Protein(f"p{i}", f"p{i}", sequence) for i, sequence in enumerate(sequences)]


def fit_config(folder: Path, **changes) -> command_fit.Config:
    """How the chain of the fixture `folder` was fitted."""
    base = command_fit.Config(
        out=folder / "chain",
        fasta=folder / "proteins.fasta",
        models=tuple(str(folder / f"{n}.pt") for n in "abc"),
        held_out=0.2,
    )
    return replace(base, **changes)


def write_locations(folder: Path) -> tuple[Path, Path]:
    """FASTA files to train and to test on: the letters tell the location."""
    draw, paths = generator(0, "locations"), (folder / "train.fasta", folder / "test.fasta")
    for path in paths:
        records = []
        for i in range(60):
            letters, where = ("KRLA", "Nucleus-U") if i % 2 else ("DELA", "Cell.membrane-U")
            drawn = torch.randint(4, (30,), generator=draw).tolist()
            records.append(Protein("", f"{i} {where}", "".join(letters[j] for j in drawn)))
        write_fasta(path, records)
    return paths


def write_residues(folder: Path) -> Path:
    """FLIP's three files: helix where the letter is A to K, strand elsewhere, C where masked."""
    found = {"sampled": [], "sequences": [], "mask": []}
    for i, protein in enumerate(proteins(60, seed=3)):
        marks = f"SET={'test' if i < 15 else 'train'} VALIDATION={15 <= i < 25}"
        classes = "".join("H" if a <= "K" else "E" for a in protein.sequence)
        found["sampled"].append(
            replace(protein, header=f"p{i} {marks}", sequence=f"C{classes[1:]}")
        )
        found["sequences"].append(protein)
        found["mask"].append(replace(protein, sequence="0" + "1" * len(classes[1:])))
    for kind, records in found.items():
        write_fasta(folder / f"toy_{kind}.fasta", records)
    return folder / "toy_sampled.fasta"
