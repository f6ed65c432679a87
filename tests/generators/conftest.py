"""Toy proteins and models: seconds, not minutes."""

import numpy as np
import pytest
import torch

from distil_rank.generators import command_prepare, evaluate
from distil_rank.generators.data import amino_acid_tokenizer, encode
from distil_rank.generators.models import fresh
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


def write_fasta(path, sequences):
    path.write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(sequences)))
    return path


def write_toy_fasta(path, n, seed=0):
    return write_fasta(path, toy_sequences(n, seed))


def prepare(fasta, out, **more):
    """A prepared folder, split at random with a fifth for tests; returns it."""
    given = {"split_by": "random", "held_out": 0.2, "context": 96} | more
    command_prepare.run(command_prepare.Config(fasta, out, **given))
    return out


@pytest.fixture(scope="session", autouse=True)
def quick():
    """What is written to measure speed is short: no test looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "TOKENS", 2)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Eighty proteins, prepared."""
    folder = tmp_path_factory.mktemp("toy")
    return prepare(write_toy_fasta(folder / "toy.fasta", 80), folder / "data")


@pytest.fixture(scope="session")
def tokenizer():
    return amino_acid_tokenizer()


@pytest.fixture(scope="session")
def proteins(tokenizer):
    return encode(toy_sequences(40), tokenizer)


@pytest.fixture
def teacher():
    return fresh(27, 3, 2, 32, 128, 0, seed=1).eval()
