"""Random proteins."""

import numpy as np
import torch

from distil_rank.proteins.fasta import AMINO_ACIDS


def toy_sequences(n, seed=0, low=12, high=70):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (n,), generator=g).tolist()
    return [
        "".join(AMINO_ACIDS[i] for i in torch.randint(20, (k,), generator=g).tolist())
        for k in lengths
    ]


def mutated(sequence, rate, rng):
    """A relative: a share of the residues are drawn anew."""
    letters = np.array(list(sequence))
    places = rng.random(len(letters)) < rate
    letters[places] = rng.choice(list(AMINO_ACIDS), places.sum())
    return "".join(letters)
