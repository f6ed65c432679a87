"""Classification probe: where a protein is located, from its mean-pooled embedding, by ridge on class indicators.

The FASTA headers tell the class as their second word, as DeepLoc gives it: `>Q9H400 Cell.membrane-M` is Cell.membrane. One file
trains, the other tests: DeepLoc's test set shares no homologs with the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.nested.ridge import RidgePath
from distil_rank.proteins.fasta import AMINO_ACIDS, clean_sequence, read_fasta
from distil_rank.core.randomness import generator
from distil_rank.core.records import interval

LONGEST = 600  # residues: longer proteins are left out, so that the probe stays short
RARE = 10  # classes with fewer proteins in training are left out
FOLDS, DRAWS = 5, 2000


@dataclass(frozen=True)
class Located:
    """Sequences and their class numbers (n,), with the classes' names."""

    sequences: list[str]
    labels: Tensor
    classes: list[str]


def read_locations(paths: Sequence[Path], limit: int, seed: int) -> tuple[Located, Located]:
    """At most `limit` proteins of the training and of the test FASTA, drawn at random; the same classes in both."""
    if len(paths) != 2:
        raise InputError(f"two FASTA files required, to train and to test on, got {len(paths)}")
    drawn = []
    for path in paths:
        records = []
        for protein in read_fasta(path):
            words = protein.header.split()
            if len(words) < 2:
                raise InputError(
                    f"a location as second word of every header required, got {protein.header!r} in {path.name}"
                )
            sequence = clean_sequence(protein.sequence)
            if len(sequence) <= LONGEST:
                records.append((sequence, words[1].rpartition("-")[0] or words[1]))
        order = torch.randperm(len(records), generator=generator(seed, "locations", path.name))[:limit].tolist()
        drawn.append([records[i] for i in sorted(order)])
    counts = Counter(label for _, label in drawn[0])
    classes = sorted(label for label, count in counts.items() if count >= RARE)
    if len(classes) < 2:
        raise InputError(f"two locations of {RARE} proteins each required, got {dict(counts)}; give more proteins")
    sets = []
    for records in drawn:
        kept = [(sequence, classes.index(label)) for sequence, label in records if label in classes]
        sets.append(Located([s for s, _ in kept], torch.tensor([c for _, c in kept]), classes))
    return sets[0], sets[1]


def composition(located: Located) -> Tensor:
    """Amino-acid frequencies (n, 20)."""
    counts = torch.tensor([[sequence.count(letter) for letter in AMINO_ACIDS] for sequence in located.sequences])
    return counts / counts.sum(1, keepdim=True)


def hits(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, classes: int, seed: int) -> Tensor:
    """Whether each test protein (m,) is put in its class, by ridge on indicators; penalty by cross-validation in training."""
    target = torch.nn.functional.one_hot(labels, classes).double()
    folds = torch.randperm(len(labels), generator=generator(seed, "location folds")) % FOLDS
    path = RidgePath(train)
    return path.predict(target, path.choose(target, folds), test).argmax(1) == truth


def accuracies(correct: Mapping[str, Tensor], reference: str, seed: int) -> dict[str, dict[str, Any]]:
    """Accuracy of each representation and its difference to `reference`, with intervals over test proteins (paired)."""
    m = len(next(iter(correct.values())))
    random = generator(seed, "location bootstrap")
    draws = [torch.randint(m, (m,), generator=random) for _ in range(DRAWS)]
    resampled = {name: torch.stack([hit.double()[draw].mean() for draw in draws]) for name, hit in correct.items()}

    def ranged(value: float, over: Tensor) -> dict[str, Any]:
        low, high = torch.quantile(over, torch.tensor([0.025, 0.975]).double()).tolist()
        return interval(value, low, high, True, n=m)

    rows = {}
    for name, hit in correct.items():
        difference = resampled[name] - resampled[reference]
        gap = float(hit.double().mean() - correct[reference].double().mean())
        rows[name] = {
            "accuracy": ranged(float(hit.double().mean()), resampled[name]),
            "difference": ranged(gap, difference),
        }
    return rows
