"""Deep mutational scanning assays as ProteinGym gives them, and its three cross-validation schemes.

A folder holds `NAME.csv` (columns `mutant`, e.g. A24G or A24G:K30R, and `score`; higher is fitter) beside `NAME.fasta` (one
record: the wild type, position 1 first). Schemes (Notin et al. 2023, ProteinNPT):

* random;
* modulo: position mod 5, so that every position is new but has neighbours in training;
* contiguous: five stretches of positions, so that whole regions are new.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.proteins.fasta import clean_sequence, read_fasta
from distil_rank.core.randomness import generator

FOLDS = 5
SCHEMES = ("random", "modulo", "contiguous")
MUTATION = re.compile(r"([A-Z])(\d+)([A-Z])")


@dataclass(frozen=True)
class Assay:
    """One assay: mutants, their sequences, mutated positions (0-based, per mutant) and scores (n,)."""

    name: str
    wild_type: str
    mutants: list[str]
    sequences: list[str]
    positions: list[list[int]]
    scores: Tensor
    measured: int  # mutants in the file, before any subsample


def read_assays(folder: str | Path, limit: int | None = None, seed: int = 0) -> list[Assay]:
    """The assays of a folder in the order of their names; at most `limit` mutants each, drawn at random without repeat."""
    folder = Path(folder)
    remedy = "give a folder of NAME.csv (mutant,score) beside NAME.fasta"
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise InputError(f"at least one assay required, got no .csv in {folder}; {remedy}")
    return [read_assay(path, limit, seed) for path in paths]


def read_assay(path: Path, limit: int | None = None, seed: int = 0) -> Assay:
    """Read and check one assay; InputError names the file and the row."""
    fasta = path.with_suffix(".fasta")
    if not fasta.is_file():
        raise InputError(
            f"the wild type of {path.name} required, got no {fasta.name} beside it; add it"
        )
    records = list(read_fasta(fasta))
    if len(records) != 1:
        raise InputError(f"one wild type required, got {len(records)} records in {fasta.name}")
    wild_type = clean_sequence(records[0].sequence)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"mutant", "score"} <= set(rows[0]):
        raise InputError(
            f"columns mutant and score required, got {', '.join(rows[0]) if rows else 'no rows'} in {path.name}"
        )
    mutants, sequences, positions, scores = [], [], [], []
    for number, row in enumerate(rows, start=2):
        where = f"{path.name}, line {number}"
        sequence, changed = mutate(wild_type, row["mutant"], where)
        try:
            score = float(row["score"])
        except ValueError:
            score = float("nan")
        if not np.isfinite(score):
            raise InputError(
                f"a finite score required, got {row['score']!r} in {where}; remove the row"
            )
        mutants.append(row["mutant"])
        sequences.append(sequence)
        positions.append(changed)
        scores.append(score)
    repeated = (
        {m for m in mutants if mutants.count(m) > 1} if len(set(mutants)) < len(mutants) else set()
    )
    if repeated:
        raise InputError(
            f"each mutant once required, got {len(repeated)} repeated in {path.name} ({min(repeated)}); average them"
        )
    if len(mutants) < 4 * FOLDS:
        raise InputError(
            f"at least {4 * FOLDS} mutants required, got {len(mutants)} in {path.name}; leave the assay out"
        )
    keep = range(len(mutants))
    if limit is not None and limit < len(mutants):
        drawn = torch.randperm(len(mutants), generator=generator(seed, "mutants", path.stem))[
            :limit
        ]
        keep = sorted(drawn.tolist())  # type: ignore[assignment]

    def pick(values: list) -> list:
        return [values[i] for i in keep]

    chosen = torch.tensor(pick(scores), dtype=torch.float64)
    return Assay(
        path.stem, wild_type, pick(mutants), pick(sequences), pick(positions), chosen, len(mutants)
    )


def mutate(wild_type: str, mutant: str, where: str) -> tuple[str, list[int]]:
    """The mutated sequence and the changed positions (0-based); InputError where the wild type does not fit."""
    letters, changed = list(wild_type), []
    for part in mutant.split(":"):
        match = MUTATION.fullmatch(part)
        if not match:
            raise InputError(f"substitutions such as A24G required, got {mutant!r} in {where}")
        old, position, new = match[1], int(match[2]) - 1, match[3]
        if not 0 <= position < len(wild_type) or wild_type[position] != old:
            found = wild_type[position] if 0 <= position < len(wild_type) else "nothing"
            raise InputError(
                f"the wild type's residue required in {mutant}, got {found} at {position + 1} in {where}; check the FASTA"
            )
        letters[position] = new
        changed.append(position)
    return "".join(letters), changed


def folds(positions: list[list[int]], scheme: str, seed: int = 0) -> Tensor:
    """Fold number 0 ... 4 of each mutant (n,); a multiple mutant goes with its first position.

    Contiguous stretches hold about equally many mutated positions.
    """
    n = len(positions)
    first = torch.tensor([p[0] for p in positions])
    if scheme == "random":
        fold = torch.empty(n, dtype=torch.long)
        fold[torch.randperm(n, generator=generator(seed, "folds", n))] = torch.arange(n) % FOLDS
        return fold
    if scheme == "modulo":
        return first % FOLDS
    if scheme == "contiguous":
        sites, rank = first.unique(return_inverse=True)
        return rank * FOLDS // len(sites)
    raise InputError(f"one of the schemes {', '.join(SCHEMES)} required, got {scheme!r}")


def one_hot(assay: Assay) -> Tensor:
    """Indicators (n, 20 x positions that vary) of the residue at every mutated position."""
    sites = sorted({p for changed in assay.positions for p in changed})
    letters = torch.tensor([[ord(s[p]) for p in sites] for s in assay.sequences])
    alphabet = torch.tensor([ord(c) for c in "ACDEFGHIKLMNPQRSTVWY"])
    return (letters[:, :, None] == alphabet).double().flatten(1)
