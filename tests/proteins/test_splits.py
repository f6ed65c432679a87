import os
import random
import subprocess
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.core.errors import InputError
from distil_rank.proteins import splits
from distil_rank.proteins.fasta import AMINO_ACIDS
from distil_rank.proteins.splits import components, near_relatives, split


def draw(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(AMINO_ACIDS, k=length))


def mutate(rng: random.Random, sequence: str, identity: float, indels: int = 2) -> str:
    """A relative with this fraction of positions kept, and a few short insertions and deletions."""
    letters = list(sequence)
    for i in rng.sample(range(len(letters)), round((1 - identity) * len(letters))):
        letters[i] = rng.choice([a for a in AMINO_ACIDS if a != letters[i]])
    for _ in range(indels):
        at = rng.randrange(len(letters))
        letters[at:at] = rng.choices(AMINO_ACIDS, k=rng.randint(1, 3))
        at = rng.randrange(len(letters) - 3)
        del letters[at : at + rng.randint(1, 3)]
    return "".join(letters)


@pytest.fixture(scope="module")
def parents() -> list[str]:
    rng = random.Random("parents")
    return [draw(rng, 200) for _ in range(25)]


def planted(parents: list[str], identity: float) -> list[str]:
    rng = random.Random(f"planted {identity}")
    return [*parents, *(mutate(rng, parent, identity) for parent in parents)]


@pytest.mark.parametrize(("identity", "least"), [(0.5, 0.9), (0.7, 1.0), (0.9, 1.0)])
def test_planted_relatives_are_found(parents, identity, least):
    labels = components(50, near_relatives(planted(parents, identity)))
    assert (labels[:25] == labels[25:]).mean() >= least
    assert len(set(labels[:25])) >= 24  # strangers stay apart


def test_mmseqs_finds_what_alignment_of_every_pair_finds(parents, monkeypatch, tmp_path):
    (tmp_path / "mmseqs").write_text("#!/bin/sh\nexit 1\n")  # what is installed has no say
    (tmp_path / "mmseqs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    sequences = planted(parents, 0.6)
    exhaustive = near_relatives(sequences)
    monkeypatch.setattr(splits, "EXHAUSTIVE", 0)
    found = near_relatives(sequences, queries=np.arange(25), slack=1)
    assert {(i, i + 25) for i in range(25)} <= set(map(tuple, found.tolist()))
    assert len(set(map(tuple, found.tolist())) ^ set(map(tuple, exhaustive.tolist()))) <= 2


def test_short_alignments_and_other_identities_are_no_relation():
    rng = random.Random(3)
    domain = draw(rng, 80)
    inside = draw(rng, 200) + mutate(rng, domain, 0.6) + draw(rng, 300)
    assert near_relatives([inside, domain]).tolist() == [[0, 1]]
    assert near_relatives([inside, domain], identity=0.9).tolist() == []
    assert near_relatives([inside, domain + draw(rng, 120)]).tolist() == []  # 80 of 200 residues


def test_equal_sequences_are_always_together_even_without_a_word():
    sequences = ["A", "", "C", "A", "", "XXXX", "XXXX"]
    assert components(7, near_relatives(sequences)).tolist() == [0, 1, 2, 0, 1, 3, 3]


def whole(pairs: list[tuple[int, int]], identity: float) -> np.ndarray:
    """Alignments over the full length of pairs, as a search returns them."""
    return np.array([(*pair, identity, *(1, 20, 20) * 2) for pair in pairs]).reshape(-1, 9)


def test_parts_are_apart_at_their_own_identity(monkeypatch):
    """Tens of proteins 90 % equal to the next one, tens of these 70 % equal to the next ten."""
    tens = whole([(i, i + 1) for i in range(599) if i % 10 != 9], 0.9)
    hundreds = whole([(i, i + 10) for i in range(0, 590, 10) if i % 100 != 90], 0.7)
    monkeypatch.setattr(splits, "search", lambda *_: np.concatenate([tens, hundreds]))
    train, val, hard = split(["AC"] * 600, [0.1, 0.34], identity=[0.9, 0.7]).parts
    assert (len(train), len(val), len(hard)) == (340, 60, 200)
    near, far = (np.array(part) for part in (val // 10, hard // 100))
    assert not set(near) & set(np.concatenate([train, hard]) // 10)
    assert not set(far) & set(np.concatenate([train, val]) // 100)
    assert set(val // 100) & set(train // 100)


def test_what_the_sensitive_search_finds_is_not_held_out(monkeypatch):
    """The fast search finds nothing, the other one every neighbor: pairs (0, 1), (2, 3), ..."""
    rng = random.Random(5)
    sequences = [draw(rng, 20) for _ in range(200)]

    monkeypatch.setattr(
        splits, "search", lambda _, asked=(): whole([(i, i ^ 1) for i in asked], 1.0)
    )
    monkeypatch.setattr(splits, "EXHAUSTIVE", 0)
    train, val = split(sequences, [0.5]).parts
    assert len(val) > 50 and not {i ^ 1 for i in val.tolist()} & set(train.tolist())


def random_split(monkeypatch, labels: list[int], fractions, seed=0):
    """A split of proteins whose clusters are given."""
    hits = whole([(labels.index(name), i) for i, name in enumerate(labels)], 1.0)
    monkeypatch.setattr(splits, "search", lambda *_: hits)
    return split(["AC"] * len(labels), fractions, seed)


@settings(max_examples=40)
@given(
    labels=st.lists(st.integers(0, 30), min_size=40, max_size=120),
    fractions=st.sampled_from([[0.2], [0.1, 0.3]]),
    seed=st.integers(0, 5),
)
def test_split_cuts_no_cluster_and_loses_nobody(labels, fractions, seed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        try:
            parts = random_split(monkeypatch, labels, fractions, seed).parts
        except InputError:
            return
        again = random_split(monkeypatch, labels, fractions, seed).parts
    names = np.array(labels)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(names)))
    for one, other in combinations(parts, 2):
        assert not set(names[one]) & set(names[other])
    assert all(len(part) <= round(share * len(names)) for part, share in zip(parts[1:], fractions))
    assert all(map(np.array_equal, parts, again))


def test_singletons_are_split_in_the_asked_shares_and_the_seed_matters(monkeypatch):
    labels = list(range(1000))
    train, val, test = random_split(monkeypatch, labels, [0.1, 0.25]).parts
    assert (len(train), len(val), len(test)) == (650, 100, 250)
    assert set(val) != set(random_split(monkeypatch, labels, [0.1, 0.25], seed=1).parts[1])


@pytest.mark.parametrize("fractions", [[], [0.0], [1.0], [0.5, 0.5], [-0.1]])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(InputError, match="fractions above 0"):
        split(["ACD"] * 9, fractions)


def test_one_giant_cluster_cannot_be_split_and_an_identity_has_a_range():
    with pytest.raises(InputError, match="more diverse"):
        split(["ACD"] * 100, [0.2])
    for identity in (0, 1.1):
        with pytest.raises(InputError, match="identity in"):
            split(["A", "C"], [0.5], identity=identity)


def test_a_failing_mmseqs_is_reported(monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="no space left")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(splits, "EXHAUSTIVE", 0)
    with pytest.raises(InputError, match="no space left"):
        near_relatives(["ACD", "ACE"])
