import random
import shutil
import subprocess
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.core.errors import InputError
from distil_rank.proteins import splits
from distil_rank.proteins.fasta import AMINO_ACIDS, read_fasta
from distil_rank.proteins.splits import cluster, related, split
from tests.proteins.reference_alignment import local_alignment


def draw(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(AMINO_ACIDS, k=length))


def mutate(rng: random.Random, sequence: str, identity: float, indels: int = 0) -> str:
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


@pytest.mark.parametrize("identity", [0.25, 0.35, 0.5, 0.9])
def test_related_agrees_with_the_slow_alignment(identity):
    rng = random.Random(f"related {identity}")
    for length in (15, 40, 60):
        a = draw(rng, length)
        for b in (
            mutate(rng, a, identity, indels=1),
            draw(rng, 60),
            draw(rng, 30) + mutate(rng, a, identity),
        ):
            scores = local_alignment(a, b)
            short = min(a, b, key=len)
            least = min(60, local_alignment(short, short).score / 2)
            reached = scores.score >= least
            if not reached:
                assert not related(a, b)
            elif len(scores.identities) == 1:  # several best alignments may differ in identity
                (matches, columns), *_ = scores.identities
                assert related(a, b) == (matches >= 0.3 * columns and 2 * columns >= len(short))
            assert related(a, b) == related(b, a)


def test_equal_sequences_are_always_together_even_without_a_word():
    assert cluster(["A", "", "C", "A", "", "XXXX", "XXXX"], candidates="words").tolist() == [
        0,
        1,
        2,
        0,
        1,
        3,
        3,
    ]


@pytest.mark.parametrize(("identity", "least"), [(0.4, 0.8), (0.5, 0.95), (0.7, 1.0), (0.9, 1.0)])
def test_planted_relatives_are_found(identity, least):
    """Uniform random substitutions, the hardest kind: real ones are mostly in loops."""
    rng = random.Random(f"planted {identity}")
    parents = [draw(rng, 270) for _ in range(60)]
    labels = cluster(
        [*parents, *(mutate(rng, p, identity, indels=2) for p in parents)], candidates="words"
    )
    assert (labels[:60] == labels[60:]).mean() >= least
    assert len(set(labels[:60])) == 60  # strangers stay apart


def test_a_domain_is_found_inside_a_longer_protein():
    rng = random.Random(3)
    domain = draw(rng, 80)
    labels = cluster(
        [draw(rng, 200) + mutate(rng, domain, 0.6) + draw(rng, 300), domain], candidates="words"
    )
    assert labels[0] == labels[1]


def test_the_order_of_sequences_and_batches_change_no_cluster(monkeypatch):
    rng = random.Random(4)
    family = [draw(rng, 120) for _ in range(15)]
    sequences = [mutate(rng, p, rng.uniform(0.3, 0.9)) for p in family for _ in range(6)]
    labels = cluster(sequences, candidates="words")
    order = rng.sample(range(len(sequences)), len(sequences))
    again = cluster([sequences[i] for i in order], candidates="words")
    assert groups(again) == {frozenset(order.index(i) for i in group) for group in groups(labels)}
    monkeypatch.setattr(splits, "_HITS_AT_ONCE", 50)
    np.testing.assert_array_equal(cluster(sequences, candidates="words"), labels)


def groups(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}


@settings(max_examples=40)
@given(
    labels=st.lists(st.integers(0, 30), min_size=40, max_size=120),
    fractions=st.sampled_from([[0.2], [0.1, 0.3]]),
    seed=st.integers(0, 5),
)
def test_split_cuts_no_cluster_and_loses_nobody(labels, fractions, seed):
    names = np.unique(labels, return_inverse=True)[1]
    try:
        parts = split(names, fractions, seed)
    except InputError:
        return
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(names)))
    for one, other in combinations(parts, 2):
        assert not set(names[one]) & set(names[other])
    assert all(len(part) <= round(share * len(names)) for part, share in zip(parts[1:], fractions))
    for part, again in zip(parts, split(names, fractions, seed)):
        np.testing.assert_array_equal(part, again)


def test_singletons_are_split_in_the_asked_shares_and_the_seed_matters():
    labels = np.arange(1000)
    train, val, test = split(labels, [0.1, 0.25])
    assert (len(train), len(val), len(test)) == (650, 100, 250)
    assert set(val) != set(split(labels, [0.1, 0.25], seed=1)[1])


@pytest.mark.parametrize("fractions", [[], [0.0], [1.0], [0.5, 0.5], [-0.1]])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(InputError, match="fractions above 0"):
        split(np.arange(9), fractions)


def test_one_giant_cluster_cannot_be_split():
    with pytest.raises(InputError, match="more diverse"):
        split(np.zeros(100, dtype=np.int64), [0.2])


@pytest.mark.parametrize("identity", [0, 1.1])
def test_impossible_identity_is_refused(identity):
    with pytest.raises(InputError, match="identity in"):
        cluster(["A"], identity)


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
def test_mmseqs_finds_planted_relatives():
    rng = random.Random(5)
    parents = [draw(rng, 200) for _ in range(20)]
    labels = cluster(
        [*parents, *(mutate(rng, p, 0.5, indels=2) for p in parents)], candidates="mmseqs"
    )
    assert (labels[:20] == labels[20:]).all()
    assert len(set(labels)) == 20


def test_a_failing_mmseqs_is_reported(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no space left")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match="no space left"):
        cluster(["ACD", "ACE"], candidates="mmseqs")


@pytest.mark.slow
def test_held_out_real_proteins_have_no_near_relative_in_training(shared_data):
    proteins = list(read_fasta(shared_data / "proteins" / "deeploc_test_set.fasta"))
    sequences = [protein.sequence for protein in proteins if len(protein.sequence) <= 700]
    train, val = split(cluster(sequences, candidates="words"), [0.2])
    rng = random.Random(6)
    checked = [(i, j) for i in rng.sample(val.tolist(), 40) for j in train.tolist()]
    straddling = [(i, j) for i, j in checked if related(sequences[i], sequences[j])]
    assert len(checked) > 50_000
    assert len({i for i, _ in straddling}) <= 2
