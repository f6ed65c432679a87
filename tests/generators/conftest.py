"""Toy proteins and models: seconds, not minutes."""

import pytest

from distil_rank.generators import command_prepare, evaluate
from distil_rank.generators.data import amino_acid_tokenizer, encode
from distil_rank.generators.models import fresh
from tests.toys import toy_sequences


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
