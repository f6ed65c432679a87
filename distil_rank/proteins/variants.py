"""Mutational scans, and what a masked language model says of every substitution.

A scan is `NAME.csv` (columns `mutant`, e.g. A24G or A24G:K30R, and `score`; higher is fitter)
beside `NAME.fasta` (one record: the wild type, position 1 first), as ProteinGym gives them.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator
from distil_rank.proteins.esm2 import ESM2, MASK, tokenise
from distil_rank.proteins.fasta import AMINO_ACIDS, clean_sequence, read_fasta
from distil_rank.proteins.masked import logits_at

MUTATION = re.compile(rf"([A-Z])(\d+)([{AMINO_ACIDS}])")


@dataclass(frozen=True)
class Assay:
    """One scan: mutants, their sequences, mutated positions (0-based, per mutant), scores (n,)."""

    name: str
    wild_type: str
    mutants: list[str]
    sequences: list[str]
    positions: list[list[int]]
    scores: Tensor
    measured: int  # mutants in the file, before any subsample


def read_assays(
    folder: str | Path, limit: int | None = None, seed: int = 0, least: int = 20
) -> list[Assay]:
    """The scans of a folder in the order of their names; see `read_assay`."""
    paths = sorted(Path(folder).glob("*.csv"))
    if not paths:
        raise InputError(
            f"at least one assay required, got no .csv in {folder};"
            " give a folder of NAME.csv (mutant,score) beside NAME.fasta"
        )
    return [read_assay(path, limit, seed, least) for path in paths]


def read_assay(path: Path, limit: int | None = None, seed: int = 0, least: int = 20) -> Assay:
    """Read and check one scan of `least` mutants or more; InputError names the file and the row.

    Of more than `limit` mutants so many are drawn at random, without repeat.
    """
    wild_type = _wild_type(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"mutant", "score"} <= set(rows[0]):
        got = ", ".join(rows[0]) if rows else "no rows"
        raise InputError(f"columns mutant and score required, got {got} in {path.name}")
    mutants = [row["mutant"] for row in rows]
    changed, scores = [], []
    for number, row in enumerate(rows, start=2):
        where = f"{path.name}, line {number}"
        changed.append(mutate(wild_type, row["mutant"], where))
        scores.append(_score(row["score"], where))
    repeated = len(mutants) - len(set(mutants))
    if repeated:
        twice = next(mutant for i, mutant in enumerate(mutants) if mutant in mutants[:i])
        raise InputError(
            f"each mutant once required, got {repeated} repeated in {path.name} ({twice}, ...);"
            " average them"
        )
    if len(mutants) < least:
        raise InputError(
            f"at least {least} mutants required, got {len(mutants)} in {path.name};"
            " leave the assay out"
        )
    keep = list(range(len(mutants)))
    if limit is not None and limit < len(mutants):
        drawn = torch.randperm(len(mutants), generator=generator(seed, "mutants", path.stem))
        keep = sorted(drawn[:limit].tolist())
    return Assay(
        name=path.stem,
        wild_type=wild_type,
        mutants=[mutants[i] for i in keep],
        sequences=[changed[i][0] for i in keep],
        positions=[changed[i][1] for i in keep],
        scores=torch.tensor([scores[i] for i in keep], dtype=torch.float64),
        measured=len(mutants),
    )


def _wild_type(path: Path) -> str:
    fasta = path.with_suffix(".fasta")
    if not fasta.is_file():
        raise InputError(
            f"the wild type of {path.name} required, got no {fasta.name} beside it; add it"
        )
    records = list(read_fasta(fasta))
    if len(records) != 1:
        raise InputError(f"one wild type required, got {len(records)} records in {fasta.name}")
    return clean_sequence(records[0].sequence)


def _score(text: str | None, where: str) -> float:
    try:
        score = float(text or "")
    except ValueError:
        score = float("nan")
    if not np.isfinite(score):
        raise InputError(f"a finite score required, got {text!r} in {where}; remove the row")
    return score


def mutate(wild_type: str, mutant: str, where: str) -> tuple[str, list[int]]:
    """Mutated sequence and changed positions (0-based); InputError where it does not fit."""
    letters, changed = list(wild_type), []
    for part in mutant.split(":"):
        match = MUTATION.fullmatch(part)
        if not match:
            raise InputError(f"substitutions such as A24G required, got {mutant!r} in {where}")
        old, position, new = match[1], int(match[2]) - 1, match[3]
        found = wild_type[position] if 0 <= position < len(wild_type) else "nothing"
        if found != old:
            raise InputError(
                f"the wild type's residue required in {mutant}, got {found} at {position + 1}"
                f" in {where}; check the FASTA"
            )
        if position in changed:
            raise InputError(f"each position once required, got {mutant!r} in {where}")
        letters[position] = new
        changed.append(position)
    return "".join(letters), changed


@torch.no_grad()
def masked_marginals(model: ESM2, sequence: str, batch_tokens: int = 8192) -> Tensor:
    """Log-odds (l, 20) of each amino acid against the wild type, float64, in order of AMINO_ACIDS.

    Every position is masked on its own (masked marginals: Meier et al., NeurIPS 2021).
    """
    tokens = tokenise([sequence])
    step = max(1, batch_tokens // tokens.shape[1])
    rows = []
    for places in torch.arange(1, len(sequence) + 1).split(step):
        hidden = torch.zeros(len(places), tokens.shape[1], dtype=torch.bool)
        hidden[torch.arange(len(places)), places] = True
        batch = tokens.expand(len(places), -1).masked_fill(hidden, MASK)
        rows.append(logits_at(model, batch, hidden).float().log_softmax(-1).double().cpu())
    found = torch.cat(rows)
    letters = tokenise([AMINO_ACIDS])[0, 1:-1]
    return found[:, letters] - found.gather(1, tokens[0, 1:-1, None])


def additive_scores(marginals: Tensor, assay: Assay) -> Tensor:
    """Score (n,) of every mutant: the sum of the marginals (l, 20) of its substitutions."""
    column = {letter: i for i, letter in enumerate(AMINO_ACIDS)}
    sums = [
        sum(float(marginals[p, column[sequence[p]]]) for p in positions)
        for sequence, positions in zip(assay.sequences, assay.positions)
    ]
    return torch.tensor(sums, dtype=torch.float64)
