"""Classification probe: where a protein is located, by ridge on class indicators.

The FASTA headers tell the class as their second word, as DeepLoc gives it: `>Q9H400
Cell.membrane-M` is Cell.membrane. One file trains, the other tests: DeepLoc's test set shares no
homologs with the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.intervals import bootstrap_counts, percentile_interval
from distil_rank.core.randomness import generator
from distil_rank.core.records import Metric, interval
from distil_rank.nested.probe import PENALTIES
from distil_rank.proteins.fasta import AMINO_ACIDS, clean_sequence, read_fasta

LONGEST = 600  # residues: longer proteins are left out, so that the probe stays short
RARE = 10  # classes with fewer proteins in training are left out
DRAWS = 2000


@dataclass(frozen=True)
class Located:
    """Sequences and their class numbers (n,), with the classes' names."""

    sequences: list[str]
    labels: Tensor
    classes: list[str]


def read_locations(
    paths: Sequence[Path], limit: int | None, seed: int
) -> tuple[Located, Located] | None:
    """At most `limit` proteins of the training and of the test FASTA, drawn at random.

    The same classes in both. None without files.
    """
    if not paths:
        return None
    if len(paths) != 2:
        raise InputError(f"two FASTA files required, to train and to test on, got {len(paths)}")
    drawn = []
    for path in paths:
        records = []
        for protein in read_fasta(path):
            words = protein.header.split()
            if len(words) < 2:
                got = f"{protein.header!r} in {path.name}"
                raise InputError(f"a location as second word of every header required, got {got}")
            sequence = clean_sequence(protein.sequence)
            if len(sequence) <= LONGEST:
                records.append((sequence, words[1].rpartition("-")[0] or words[1]))
        order = torch.randperm(len(records), generator=generator(seed, "locations", path.name))
        drawn.append([records[i] for i in sorted(order[:limit].tolist())])
    counts = Counter(label for _, label in drawn[0])
    classes = sorted(label for label, count in counts.items() if count >= RARE)
    if len(classes) < 2:
        required = f"two locations of {RARE} proteins each required"
        raise InputError(f"{required}, got {dict(counts)}; give more proteins")
    kept = ([(s, label) for s, label in part if label in classes] for part in drawn)
    train, test = (
        Located([s for s, _ in part], torch.tensor([classes.index(c) for _, c in part]), classes)
        for part in kept
    )
    return train, test


def composition(located: Located) -> Tensor:
    """Amino-acid frequencies (n, 20)."""
    counts = torch.tensor([[s.count(a) for a in AMINO_ACIDS] for s in located.sequences])
    return counts / counts.sum(1, keepdim=True)


def hits(train: Tensor, test: Tensor, located: tuple[Located, Located]) -> Tensor:
    """Whether each test protein (m,) is put in its class; penalty by leaving training rows out."""
    from sklearn.linear_model import RidgeCV

    labels, truth = (part.labels for part in located)
    target = torch.nn.functional.one_hot(labels, len(located[0].classes)).double()
    x = train.double().numpy()
    spread = x.var(0).sum() or 1.0
    model = RidgeCV(alphas=spread * PENALTIES.numpy()).fit(x, target.numpy())
    return torch.from_numpy(model.predict(test.double().numpy())).argmax(1) == truth


def accuracies(
    correct: Mapping[str, Tensor], reference: str, seed: int
) -> dict[str, dict[str, Metric]]:
    """Accuracy of each representation and its paired difference to `reference`."""
    m = len(correct[reference])
    counts = bootstrap_counts(m, DRAWS, generator(seed, "location bootstrap"))

    def mean(hit: Tensor) -> Metric:
        low, high = percentile_interval(counts @ hit / m)
        return interval(float(hit.mean()), low, high, True, n=m)

    base = correct[reference].double()
    return {
        name: {"accuracy": mean(hit.double()), "difference": mean(hit.double() - base)}
        for name, hit in correct.items()
    }
