"""Score mutations with a masked language model: log-odds against the wild type, no training.

    distil-rank score variants.csv --model nano-256 --out scores.csv
    distil-rank score variants.csv --model small/ --wild-type protein.fasta --out scores.csv

The CSV has a column `mutant`: A24G, or A24G:K30R for several at once; position 1 is the first. The
wild type is the one record of --wild-type, of NAME.fasta beside NAME.csv, or in the columns and the
reference file of ProteinGym. The result has the mutants in their order with two scores (Meier et
al., NeurIPS 2021), sums over the substitutions of log p(mutant) - log p(wild type):

* `masked_marginal`: each mutated position is masked on its own;
* `wild_type_marginal`: one pass over the wild type, nothing masked.

Of a protein of more than 1,022 residues the model sees those around each position, and
`wild_type_marginal` takes one pass a position. Higher is more likely. What both are worth:
docs/embedding.md.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError
from distil_rank.core.records import atomic, require_writable
from distil_rank.proteins.checkpoints import load_model
from distil_rank.proteins.variants import (
    additive_scores,
    masked_marginals,
    read_assay,
    read_reference,
    wild_type_marginals,
)


@dataclass(frozen=True)
class Config:
    variants: Annotated[Path, tyro.conf.Positional]  # CSV with a column `mutant`
    model: str  # a model by name, file or folder
    out: Path  # where to write
    wild_type: Path | None = None  # FASTA of the wild type (default: NAME.fasta beside NAME.csv)
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    """Write `config.out`. InputError before anything is computed."""
    path, fasta = config.variants, config.wild_type
    told = read_reference(path.parent).get(path.stem)
    assay = read_assay(path, least=1, reference=told, fasta=fasta, measured=False)
    read = path.resolve(), (fasta or path.with_suffix(".fasta")).resolve()
    if config.out.is_dir() or config.out.resolve() in read:
        raise InputError(f"a new file required for --out, got {config.out}; add scores.csv")
    require_writable(config.out.absolute().parent)
    model = load_model(config.model, pick_device(config.device), head=True).model
    mutated = sorted({position for positions in assay.positions for position in positions})
    masked = additive_scores(masked_marginals(model, assay.wild_type, places=mutated), assay)
    plain = additive_scores(wild_type_marginals(model, assay.wild_type, places=mutated), assay)
    with atomic(config.out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["mutant", "masked_marginal", "wild_type_marginal"])
        for mutant, *scores in zip(assay.mutants, masked.tolist(), plain.tolist()):
            writer.writerow([mutant, *(f"{score:.6f}" for score in scores)])
    print(f"{config.out}: {len(assay.mutants)} mutants of {len(assay.wild_type)} residues")
