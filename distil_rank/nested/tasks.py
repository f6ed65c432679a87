"""Classification beside the assays: the class of a protein, or of every residue.

* Location: two FASTA files, to train and to test on, whose headers tell the class as their second
  word, as DeepLoc gives it: `>Q9H400 Cell.membrane-M` is Cell.membrane. A fifth of the first file
  validates.
* Residues: `NAME_sampled.fasta.gz` of FLIP (Dallago et al. 2021), a letter per residue, with
  SET=train or test and VALIDATION=True or False in the header; beside it `NAME_sequences.fasta.gz`
  and, where residues are unresolved, `NAME_mask.fasta.gz` (0: not counted).

One linear probe serves all: linear discriminant analysis, which follows from the moments of
features and class indicators. Every representation and every baseline is an affine image of the raw
embeddings side by side with a window of one-hot letters, so one streaming pass over the training
rows fits them all:

    Sigma = T (Cov x - C diag(1 / p) C^T) T^T,  C = Cov(x, indicators), p = shares of the classes
    score of class c = w_c^T T (x - mean x) + b_c,  w_c = Sigma_s^-1 T C_c / p_c,
    b_c = log p_c - w_c^T T C_c / (2 p_c),  Sigma_s = (1 - s) Sigma + s trace(Sigma) / dim I

The shrinkage s with the best accuracy on the validation proteins is kept.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from distil_rank.core.errors import InputError
from distil_rank.core.intervals import DRAWS, bootstrap_counts, percentile_interval
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import Metric, Record, interval
from distil_rank.nested.features import Representation
from distil_rank.nested.rows import BATCH, StoreRows, batches
from distil_rank.proteins.fasta import AMINO_ACIDS, clean_sequence, read_fasta

SIDES = ("train", "validation", "test")
LONGEST = 600  # residues: longer proteins are left out, so that the probe stays short
RARE = 10  # classes with fewer training proteins are left out
WINDOW = 15  # letters of the window baseline
SHRINKAGE = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
LETTERS = len(AMINO_ACIDS)
Labeled = tuple[str, list[str | None]]  # a sequence, the class of the protein or of every residue


@dataclass(frozen=True)
class Task:
    """Proteins by side: a sequence and class numbers (1,) or (residues,), -1 where none counts."""

    name: str
    pool: str  # what a row is: `mean`, a protein, or `residues`
    classes: list[str]
    proteins: dict[str, list[tuple[str, Tensor]]]


def assembled(
    name: str, pool: str, found: Mapping[str, list[Labeled]], limit: int | None, seed: int
) -> Task:
    """At most `limit` proteins of every side, drawn at random; classes rare in training are out.

    InputError where a protein is on the test side and on another.
    """
    fitted = {sequence for side in SIDES[:2] for sequence, _ in found[side]}
    if shared := len(fitted & {sequence for sequence, _ in found["test"]}):
        raise InputError(
            f"test proteins that are in no other part required, got {shared} in {name}"
        )
    chosen = {}
    for side in SIDES:
        short = [record for record in found[side] if len(record[0]) <= LONGEST]
        order = torch.randperm(len(short), generator=generator(seed, "task", name, side))
        chosen[side] = [short[i] for i in sorted(order[:limit].tolist())]
    counts = Counter(label for _, labels in chosen["train"] for label in labels if label)
    classes = sorted(label for label, count in counts.items() if count >= RARE)
    if len(classes) < 2 or not all(chosen.values()):
        required = f"two classes, {RARE} times each in training, and proteins of every side"
        sizes = ", ".join(f"{len(records)} to {side}" for side, records in chosen.items())
        raise InputError(f"{required} required, got {dict(counts)} and {sizes} in {name}")
    number = {label: i for i, label in enumerate(classes)}
    proteins = {
        side: [
            (s, torch.tensor([number.get(x or "", -1) for x in labels])) for s, labels in records
        ]
        for side, records in chosen.items()
    }
    return Task(name, pool, classes, proteins)


def read_locations(paths: Sequence[Path], limit: int | None, seed: int) -> Task:
    if len(paths) != 2:
        raise InputError(f"two FASTA files required, to train and to test on, got {len(paths)}")
    files: list[list[Labeled]] = [[], []]
    for path, records in zip(paths, files):
        for protein in read_fasta(path):
            words = protein.header.split()
            if len(words) < 2:
                got = f"{protein.header!r} in {path.name}"
                raise InputError(f"a location as second word of every header required, got {got}")
            location = words[1].rpartition("-")[0] or words[1]
            records.append((clean_sequence(protein.sequence), [location]))
    train, test = files
    sides = {"train": [x for i, x in enumerate(train) if i % 5], "validation": train[::5]}
    return assembled("location", "mean", {**sides, "test": test}, limit, seed)


def read_residues(path: Path, limit: int | None, seed: int) -> Task:
    name, mark, end = path.name.partition("_sampled")
    if not mark:
        raise InputError(f"a file NAME_sampled.fasta or .fasta.gz required, got {path.name}")
    sequences, mask = (path.with_name(f"{name}_{kind}{end}") for kind in ("sequences", "mask"))
    letters = {protein.id: clean_sequence(protein.sequence) for protein in read_fasta(sequences)}
    kept = {p.id: p.sequence for p in read_fasta(mask)} if mask.is_file() else {}
    found: dict[str, list[Labeled]] = {side: [] for side in SIDES}
    for protein in read_fasta(path):
        sequence, labels = letters.get(protein.id, ""), protein.sequence
        counted = kept.get(protein.id, "1" * len(labels))
        if not len(sequence) == len(labels) == len(counted):
            got = f"{len(sequence)}, {len(labels)} and {len(counted)} for {protein.id}"
            raise InputError(f"as many letters, classes and marks required, got {got} in {name}")
        marks = dict(word.split("=", 1) for word in protein.header.split()[1:] if "=" in word)
        side = "validation" if marks.get("VALIDATION") == "True" else marks.get("SET")
        if side not in found:
            raise InputError(f"SET=train or test required, got {protein.header!r} in {path.name}")
        classes = [label if mark == "1" else None for label, mark in zip(labels, counted)]
        found[side].append((sequence, classes))
    return assembled(name, "residues", found, limit, seed)


def letter_windows(sequence: str) -> Tensor:
    """One-hot letters (residues, WINDOW x 20) around each residue; zero beyond the ends."""
    indices = torch.tensor([AMINO_ACIDS.find(a) % (LETTERS + 1) for a in sequence])
    around = pad(indices, (WINDOW // 2, WINDOW // 2), value=LETTERS).unfold(0, WINDOW, 1)
    return one_hot(around, LETTERS + 1)[:, :, :LETTERS].flatten(1).double()


def joined_rows(
    task: Task, stores: Mapping[str, StoreRows], side: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of rows (n, d), their classes (n,) and proteins (n,); rows that do not count are out.

    A row is the raw embeddings of all sizes and the window of letters. The stores hold the proteins
    of all sides, one after the other.
    """
    offset = sum(len(task.proteins[s]) for s in SIDES[: SIDES.index(side)])
    proteins = task.proteins[side]
    lengths = [len(labels) for _, labels in proteins]
    for first, last in batches(lengths, 0, len(proteins), BATCH):
        raws = [r.read(offset + first, offset + last).double() for r in stores.values()]
        windows = [letter_windows(sequence) for sequence, _ in proteins[first:last]]
        if task.pool == "mean":
            windows = [window.mean(0, keepdim=True) for window in windows]
        labels = torch.cat([labels for _, labels in proteins[first:last]])
        owner = torch.arange(first, last).repeat_interleave(torch.tensor(lengths[first:last]))
        counted = labels >= 0
        rows = torch.cat([*raws, torch.cat(windows)], 1)
        yield rows[counted], labels[counted], owner[counted]


def projections(
    task: Task, widths: Mapping[str, int], compared: Sequence[Representation]
) -> dict[str, Tensor]:
    """Matrix T (dim, d) on joined rows of every representation and baseline."""
    total, span = sum(widths.values()), WINDOW * LETTERS
    every = torch.eye(total + span, dtype=torch.float64)
    raws = dict(zip(widths, every[:, :total].split(list(widths.values()), 1)))
    nothing = {size: torch.zeros_like(part[:1]) for size, part in raws.items()}
    found = {  # affine: the columns of T are the images of unit vectors
        r.name.partition("#")[0]: (r.features(raws) - r.features(nothing)).T
        for r in compared
        if r.draw in (None, 0)
    }
    window = every[total:]
    center = window[WINDOW // 2 * LETTERS :][:LETTERS]
    if task.pool == "mean":
        return {**found, "composition": center}
    return {**found, "one-hot": center, "one-hot-window": window}


def discriminants(moments: Moments, T: Tensor, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (d, classes) and biases of T x for every shrinkage; `moments` of [x, indicators]."""
    covariance, shares = moments.covariance, moments.mean[-classes:]
    across = covariance[:-classes, -classes:]
    within = covariance[:-classes, :-classes] - across / shares @ across.T
    C = T @ across / shares  # class means less the mean (dim, classes)
    L, Q = torch.linalg.eigh(T @ within @ T.T)
    unit = L.mean() + 1e-12 * (C.square() @ shares).mean()  # above 0 where classes do not vary
    for s in SHRINKAGE:
        W = Q @ ((Q.T @ C) / ((1 - s) * L.clamp_min(0) + s * unit)[:, None])
        weights = T.T @ W
        bias = shares.log() - 0.5 * (W * C).sum(0) - moments.mean[:-classes] @ weights
        yield weights, bias


def confusions(
    task: Task,
    stores: Mapping[str, StoreRows],
    side: str,
    probes: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Counts (probes, proteins, true class, predicted class)."""
    size = len(task.classes)
    counts = torch.zeros(len(probes), len(task.proteins[side]), size, size, dtype=torch.float64)
    weights, bias = (torch.cat(parts, -1) for parts in zip(*probes))
    for rows, labels, owner in joined_rows(task, stores, side):
        predicted = (rows @ weights + bias).view(len(rows), len(probes), size).argmax(2)
        for found, column in zip(counts, predicted.T):
            found.index_put_((owner, labels, column), found.new_ones(1), accumulate=True)
    return counts


def accuracy(counts: Tensor) -> Tensor:
    """Share of rows on the diagonal of confusion matrices (..., true, predicted)."""
    return counts.diagonal(dim1=-2, dim2=-1).sum(-1) / counts.sum((-2, -1))


def macro_f1(counts: Tensor) -> Tensor:
    """Mean over classes of 2 hits / (true + predicted), 0 where a class is neither."""
    hits = counts.diagonal(dim1=-2, dim2=-1)
    return (2 * hits / (counts.sum(-1) + counts.sum(-2)).clamp_min(1)).mean(-1)


def measure(
    task: Task,
    stores: Mapping[str, StoreRows],
    compared: Sequence[Representation],
    reference: str,
    seed: int,
) -> Record:
    """Accuracy and macro-F1 on the test proteins, and the paired difference to `reference`."""
    size = len(task.classes)
    widths = {name: rows.dim for name, rows in stores.items()}
    moments = Moments(sum(widths.values()) + WINDOW * LETTERS + size)
    for rows, labels, _ in joined_rows(task, stores, "train"):
        moments.update(torch.cat([rows, one_hot(labels, size).double()], 1))
    maps = projections(task, widths, compared)
    probes = {name: list(discriminants(moments, T, size)) for name, T in maps.items()}
    grid = confusions(task, stores, "validation", [p for path in probes.values() for p in path])
    best = accuracy(grid.sum(1)).view(len(probes), len(SHRINKAGE)).argmax(1).tolist()
    chosen = [path[i] for path, i in zip(probes.values(), best)]
    tested = dict(zip(probes, confusions(task, stores, "test", chosen)))
    proteins = len(task.proteins["test"])
    draws = bootstrap_counts(proteins, DRAWS, generator(seed, task.name, "bootstrap"))
    resampled = {
        name: (draws @ counts.flatten(1)).view(-1, size, size) for name, counts in tested.items()
    }

    def metric(name: str, score: Callable[[Tensor], Tensor], base: str | None = None) -> Metric:
        value, drawn = score(tested[name].sum(0)), score(resampled[name])
        if base is not None:
            value, drawn = value - score(tested[base].sum(0)), drawn - score(resampled[base])
        return interval(float(value), *percentile_interval(drawn), True, n=proteins)

    return {
        "classes": task.classes,
        "proteins": {side: len(found) for side, found in task.proteins.items()},
        "rows": {"train": int(moments.count), "test": int(tested[reference].sum())},
        "majority_accuracy": float(tested[reference].sum((0, 2)).max() / tested[reference].sum()),
        "reference": reference,
        "results": {
            name: {
                "accuracy": metric(name, accuracy),
                "macro_f1": metric(name, macro_f1),
                "difference": metric(name, accuracy, reference),
            }
            for name in tested
        },
    }
