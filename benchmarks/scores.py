"""Scores of mutations without training, against twelve measured scans: nano-256 beside BLOSUM62.

    python -m benchmarks.scores    # minutes; writes benchmarks/results/scores.json

Spearman of the scores of `distil-rank score` with the measured ones; of BLOSUM62 the entry of wild
type and mutant (better than less that of the wild type with itself), summed over substitutions.
Intervals: bootstrap over the positions of a scan, whose mutants stay together, with ranks as in the
whole scan; of means and differences, over scans.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from scoring_matrices import ScoringMatrix

import benchmarks
from distil_rank.core.intervals import bootstrap_counts, mean_interval, percentile_interval
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, Record, environment, interval, sha256, write_json
from distil_rank.core.tables import markdown, with_interval
from distil_rank.proteins.checkpoints import load_model
from distil_rank.proteins.esm2 import ESM2
from distil_rank.proteins.fasta import AMINO_ACIDS
from distil_rank.proteins.variants import (
    Assay,
    additive_scores,
    masked_marginals,
    read_assays,
    wild_type_marginals,
)

DATA = benchmarks.DATA / "dms"
OUT, SCHEMA = ROOT / "benchmarks" / "results" / "scores.json", "distil-rank/benchmark-scores/1"
MODEL, DRAWS = "nano-256", 1000
SCORES = {
    "masked_marginal": "masked marginal",
    "wild_type_marginal": "wild-type marginal",
    "blosum62": "BLOSUM62",
}


def substitution(wild_type: str) -> torch.Tensor:
    """BLOSUM62 (l, 20): of each amino acid with the wild type."""
    rows: Any = ScoringMatrix.from_name("BLOSUM62").shuffle(AMINO_ACIDS)
    table = torch.tensor([list(row) for row in rows], dtype=torch.float64)
    return table[[AMINO_ACIDS.index(letter) for letter in wild_type]]


def spearman(x: NDArray, y: NDArray, counts: NDArray) -> NDArray:
    """Correlation of the ranks of x and y (n,) where mutants count so often: counts (draws, n)."""
    x, y = (rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    mean_x, mean_y = (counts @ v / counts.sum(1) for v in (x, y))
    xx, yy, xy = (counts @ v / counts.sum(1) for v in (x * x, y * y, x * y))
    return (xy - mean_x * mean_y) / np.sqrt((xx - mean_x**2) * (yy - mean_y**2))


def measured(assay: Assay, model: ESM2) -> Record:
    """Spearman of every score on one scan."""
    marginals = {
        "masked_marginal": masked_marginals(model, assay.wild_type),
        "wild_type_marginal": wild_type_marginals(model, assay.wild_type),
        "blosum62": substitution(assay.wild_type),
    }
    n, y = len(assay.mutants), assay.scores.numpy()
    drawn = bootstrap_counts(len(assay.wild_type), DRAWS, generator(0, "positions", assay.name))
    counts = drawn.numpy()[:, [positions[0] for positions in assay.positions]]
    found: Record = {"residues": len(assay.wild_type), "mutants": n}
    for name, table in marginals.items():
        x = additive_scores(table, assay).numpy()
        limits = percentile_interval(spearman(x, y, counts))
        found[name] = interval(float(spearman(x, y, np.ones((1, n)))[0]), *limits, True, n=n)
    return found


def main() -> None:
    loaded = load_model(MODEL, head=True)
    assays = read_assays(DATA)
    cells = {assay.name: measured(assay, loaded.model) for assay in assays}
    values = {name: [cell[name]["value"] for cell in cells.values()] for name in SCORES}
    above = np.subtract(values["masked_marginal"], values["blosum62"])
    record = {
        "schema": SCHEMA,
        "config": {"model": MODEL, "draws": DRAWS},
        "data": {path.name: sha256(path) for path in sorted(DATA.glob("*.*"))},
        "weights_sha256": loaded.sha256,
        "assays": cells,
        "mean": {k: mean_interval(v, generator(0, "scans"), True) for k, v in values.items()},
        "masked_above_blosum62": mean_interval(above, generator(0, "scans"), True),
        "environment": environment(),
        "machine_dependent": ["environment"],
    }
    write_json(OUT, record)
    print(table(record))


def table(record: Record) -> str:
    """Spearman by scan, and its mean."""
    rows = [["scan", "mutants", *SCORES.values()]]
    for name, cell in record["assays"].items():
        found = [with_interval(cell[score], ".2f") for score in SCORES]
        rows.append([name, f"{cell['mutants']:,}", *found])
    rows.append(["mean", "", *(with_interval(record["mean"][k], ".3f") for k in SCORES)])
    more = with_interval(record["masked_above_blosum62"], ".3f")
    return f"{markdown(rows)}\n\nMasked marginal less BLOSUM62, mean over scans: {more}."


if __name__ == "__main__":
    main()
