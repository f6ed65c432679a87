"""Mutational scans, and what a masked language model says of every substitution.

A scan is `NAME.csv` (columns `mutant`, e.g. A24G or A24G:K30R, and `score`; higher is fitter)
beside `NAME.fasta` (one record: the wild type, position 1 first). Or it is an official file of
ProteinGym: `mutant`, `DMS_score`, and what it has of `mutated_sequence` and of the folds
`fold_random_5`, `fold_modulo_5` and `fold_contiguous_5`. The reference file,
`DMS_substitutions.csv` in the folder or beside it, gives wild types, proteins and function types.
"""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator
from distil_rank.proteins.esm2 import ESM2, MASK, tokenise
from distil_rank.proteins.fasta import AMINO_ACIDS, clean_sequence, read_fasta
from distil_rank.proteins.masked import logits_at

WINDOW = 1024  # tokens that ESM-2 was trained on, <cls> and <eos> included
REFERENCE = "DMS_substitutions.csv"
FOLD = re.compile(r"fold_(random|modulo|contiguous)_5")
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
    folds: dict[str, Tensor] = field(default_factory=dict)  # official fold numbers (n,) by scheme
    protein: str = ""  # UniProt_ID, where the reference file tells it
    function: str = ""  # coarse_selection_type, likewise


def read_assays(
    folder: str | Path, limit: int | None = None, seed: int = 0, least: int = 20
) -> list[Assay]:
    """The scans of a folder in the order of their names; see `read_assay`."""
    paths = sorted(path for path in Path(folder).glob("*.csv") if path.name != REFERENCE)
    if not paths:
        remedy = "give a folder of NAME.csv (mutant,score) beside NAME.fasta"
        raise InputError(f"at least one assay required, got no .csv in {folder}; {remedy}")
    told = read_reference(folder)
    return [read_assay(path, limit, seed, least, told.get(path.stem)) for path in paths]


def read_reference(folder: str | Path) -> dict[str, dict[str, str]]:
    """Rows of the reference file in a folder or beside it by scan; none where there is no file."""
    found = [place / REFERENCE for place in (Path(folder), Path(folder).absolute().parent)]
    rows = next((_rows(path) for path in found if path.is_file()), [])
    if rows and "DMS_id" not in rows[0]:
        raise InputError(f"a column DMS_id required in {REFERENCE}, got {', '.join(rows[0])}")
    return {row["DMS_id"]: row for row in rows}


def read_assay(
    path: Path,
    limit: int | None = None,
    seed: int = 0,
    least: int = 20,
    reference: Mapping[str, str] | None = None,
    fasta: Path | None = None,
    measured: bool = True,
) -> Assay:
    """Read and check one scan of `least` mutants or more; InputError names the file and the row.

    Of more than `limit` mutants so many are drawn at random, without repeat. `reference` is the
    scan's row of the reference file, `fasta` a wild type that is not beside the scan. Mutants that
    are not `measured` have no scores (NaN) and may repeat.
    """
    rows, reference = _rows(path), reference or {}
    columns = set(rows[0]) if rows else set()
    measure = next((name for name in ("DMS_score", "score") if name in columns), "")
    if "mutant" not in columns or (measured and not measure):
        got = ", ".join(map(str, rows[0])) if rows else "no rows"
        required = "columns mutant and score, or DMS_score," if measured else "a column mutant"
        raise InputError(f"{required} required, got {got} in {path.name}")
    wild_type = _wild_type(path, fasta, rows[0], reference)
    schemes = {match[1]: match[0] for match in map(FOLD.fullmatch, rows[0]) if match}
    read = []
    for number, row in enumerate(rows, start=2):
        where = f"{path.name}, line {number}"
        sequence, positions = mutate(wild_type, row["mutant"], where)
        if row.get("mutated_sequence", sequence) != sequence:
            required = f"the wild type with {row['mutant']} required as mutated_sequence"
            raise InputError(f"{required}, got another sequence in {where}; check the wild type")
        score = _number(row[measure], "score", where) if measured else float("nan")
        folds = [int(_number(row[column], "fold", where)) for column in schemes.values()]
        read.append((row["mutant"], sequence, positions, score, folds))
    ((twice, count),) = Counter(row["mutant"] for row in rows).most_common(1)
    if count > 1 and measured:
        got = f"{twice} {count} times in {path.name}; average them"
        raise InputError(f"each mutant once required, got {got}")
    if len(read) < least:
        got = f"{len(read)} in {path.name}; leave the assay out"
        raise InputError(f"at least {least} mutants required, got {got}")
    keep = list(range(len(read)))
    if limit is not None and limit < len(read):
        drawn = torch.randperm(len(read), generator=generator(seed, "mutants", path.stem))
        keep = sorted(drawn[:limit].tolist())
    mutants, sequences, changed, scores, numbers = map(list, zip(*(read[i] for i in keep)))
    return Assay(
        name=path.stem,
        wild_type=wild_type,
        mutants=mutants,
        sequences=sequences,
        positions=changed,
        scores=torch.tensor(scores, dtype=torch.float64),
        measured=len(read),
        folds=dict(zip(schemes, torch.tensor(numbers).T)),
        protein=reference.get("UniProt_ID", ""),
        function=reference.get("coarse_selection_type", ""),
    )


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"a readable CSV required, got {path}: {error}") from None
    if any(None in row for row in rows):
        raise InputError(f"a name for every column required, got rows with more in {path.name}")
    return rows


def _wild_type(
    path: Path, fasta: Path | None, first: Mapping[str, str], reference: Mapping[str, str]
) -> str:
    """From a FASTA, the reference file, or a mutated sequence with its mutations undone."""
    fasta, named = fasta or path.with_suffix(".fasta"), fasta is not None
    if not (named or fasta.is_file()):
        if reference.get("target_seq"):
            return clean_sequence(reference["target_seq"])
        if first.get("mutated_sequence"):
            undone = list(first["mutated_sequence"])
            for match in MUTATION.finditer(first["mutant"]):
                undone[int(match[2]) - 1 : int(match[2])] = match[1]
            return clean_sequence("".join(undone))
        raise InputError(
            f"the wild type of {path.name} required, got no {fasta.name} beside it and no"
            f" {REFERENCE}; add one, or name it with --wild-type"
        )
    records = list(read_fasta(fasta))
    if len(records) != 1:
        raise InputError(f"one wild type required, got {len(records)} records in {fasta.name}")
    return clean_sequence(records[0].sequence)


def _number(text: str, what: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"a finite {what} required, got {text!r} in {where}; remove the row")
    return number


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
def masked_marginals(
    model: ESM2, sequence: str, batch_tokens: int = 8192, places: Sequence[int] | None = None
) -> Tensor:
    """Log-odds (l, 20) of each amino acid against the wild type, float64, in order of AMINO_ACIDS.

    Every position, or those of `places` (the others are NaN), is masked on its own (masked
    marginals: Meier et al., NeurIPS 2021). Of a protein longer than `WINDOW` tokens the model sees
    those around the position (as ProteinGym: Notin et al., NeurIPS 2023).
    """
    return _marginals(model, sequence, batch_tokens, places, MASK)


@torch.no_grad()
def wild_type_marginals(
    model: ESM2, sequence: str, batch_tokens: int = 8192, places: Sequence[int] | None = None
) -> Tensor:
    """The same log-odds (l, 20) with nothing masked: one pass, or one a position of long ones."""
    tokens = tokenise([sequence])
    if tokens.shape[1] > WINDOW:
        return _marginals(model, sequence, batch_tokens, places, None)
    residues = torch.ones_like(tokens, dtype=torch.bool)
    residues[:, [0, -1]] = False
    return _log_odds(logits_at(model, tokens, residues), tokens[0, 1:-1])


def _marginals(
    model: ESM2, sequence: str, batch_tokens: int, places: Sequence[int] | None, hidden: int | None
) -> Tensor:
    """Log-odds at each place, with the token `hidden` there, of the window around it."""
    (tokens,) = tokenise([sequence])
    width = min(WINDOW, len(tokens))
    columns = torch.arange(len(sequence)) if places is None else torch.tensor(places).long()
    found = torch.full((len(sequence), 20), torch.nan, dtype=torch.float64)
    for some in columns.split(max(1, batch_tokens // width)):
        starts = (some + 1 - width // 2).clamp(0, len(tokens) - width)
        batch = tokens[starts[:, None] + torch.arange(width)]
        asked = torch.zeros_like(batch, dtype=torch.bool)
        asked[torch.arange(len(some)), some + 1 - starts] = True
        batch = batch if hidden is None else batch.masked_fill(asked, hidden)
        found[some] = _log_odds(logits_at(model, batch, asked), tokens[some + 1])
    return found


def _log_odds(logits: Tensor, wild_type: Tensor) -> Tensor:
    """log p(amino acid) - log p(wild type) (k, 20) of logits (k, 33), wild-type tokens (k,)."""
    logs = logits.float().log_softmax(-1).double().cpu()
    return logs[:, tokenise([AMINO_ACIDS])[0, 1:-1]] - logs.gather(1, wild_type[:, None])


def additive_scores(marginals: Tensor, assay: Assay) -> Tensor:
    """Score (n,) of every mutant: the sum of the marginals (l, 20) of its substitutions."""
    column = {letter: i for i, letter in enumerate(AMINO_ACIDS)}
    sums = [
        sum(float(marginals[p, column[sequence[p]]]) for p in positions)
        for sequence, positions in zip(assay.sequences, assay.positions)
    ]
    return torch.tensor(sums, dtype=torch.float64)
