"""Assays and folds: what a model must not see stays unseen, and one-hot features show it."""

import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.nested.assays import FOLDS, folds, mutate, one_hot, read_assay, read_assays
from distil_rank.nested.compare import spearman
from distil_rank.nested.ridge import RidgePath
from distil_rank.proteins.fasta import AMINO_ACIDS
from distil_rank.core.randomness import generator

WILD_TYPE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK"


def write_assay(folder, name="TOY", lines=None, wild_type=WILD_TYPE):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.fasta").write_text(f">{name}\n{wild_type}\n")
    (folder / f"{name}.csv").write_text("mutant,score\n" + "\n".join(lines or synthetic()) + "\n")
    return folder / f"{name}.csv"


def synthetic(seed=0, per_site=6):
    """Scores = a strong effect of the position, a small one of the substitution, noise."""
    draw = generator(seed, "synthetic")
    site, letter = torch.randn(len(WILD_TYPE), generator=draw), 0.3 * torch.randn(20, generator=draw)
    lines = []
    for p, old in enumerate(WILD_TYPE):
        for a in torch.randperm(20, generator=draw)[:per_site].tolist():
            if AMINO_ACIDS[a] != old:
                score = site[p] + letter[a] + 0.3 * torch.randn((), generator=draw)
                lines.append(f"{old}{p + 1}{AMINO_ACIDS[a]},{float(score):.6f}")
    return lines


@pytest.mark.parametrize("seed", range(3))
def test_one_hot_collapses_on_contiguous_folds_but_not_on_random_ones(tmp_path, seed):
    assay = read_assay(write_assay(tmp_path / "dms", lines=synthetic(seed)))
    path = RidgePath(one_hot(assay))

    def score(scheme):
        return spearman(path.nested(assay.scores, folds(assay.positions, scheme))[0].numpy(), assay.scores.numpy())

    assert score("random") > 0.4
    assert score("contiguous") < 0.15
    assert score("modulo") < 0.15


def test_schemes(tmp_path):
    assay = read_assay(write_assay(tmp_path / "dms"))
    position = torch.tensor([p[0] for p in assay.positions])
    random, modulo, contiguous = (folds(assay.positions, s) for s in ("random", "modulo", "contiguous"))
    for fold in (random, modulo, contiguous):
        assert fold.unique().tolist() == list(range(FOLDS))
    assert random.bincount().max() - random.bincount().min() <= 1
    assert torch.equal(random, folds(assay.positions, "random")) and not torch.equal(
        random, folds(assay.positions, "random", 1)
    )
    assert torch.equal(modulo, position % 5)
    order = position.argsort(stable=True)
    assert (contiguous[order].diff() >= 0).all()  # stretches
    for fold in (modulo, contiguous):  # no position on two sides
        assert all(len(fold[position == p].unique()) == 1 for p in position.unique())
    with pytest.raises(InputError, match="one of the schemes"):
        folds(assay.positions, "leave-one-out")


def test_subsample_is_seeded_and_in_file_order(tmp_path):
    path = write_assay(tmp_path / "dms")
    whole, one, two, other = read_assay(path), read_assay(path, 50), read_assay(path, 50), read_assay(path, 50, seed=1)
    assert one.mutants == two.mutants != other.mutants and len(one.mutants) == 50 and one.measured == len(whole.mutants)
    assert [m for m in whole.mutants if m in set(one.mutants)] == one.mutants
    at = whole.mutants.index(one.mutants[7])
    assert whole.scores[at] == one.scores[7] and whole.sequences[at] == one.sequences[7]


def test_mutate():
    assert mutate("ACDE", "C2G", "") == ("AGDE", [1])
    assert mutate("ACDE", "A1W:E4K", "") == ("WCDK", [0, 3])


def test_real_assays(shared_data):
    assays = read_assays(shared_data / "dms", limit=40)
    assert len(assays) == 12 and sum(a.measured for a in assays) == 22949
    for assay in assays:
        for sequence, (p, *_), mutant in zip(assay.sequences, assay.positions, assay.mutants):
            assert sequence[p] == mutant[-1] and len(sequence) == len(assay.wild_type)


BAD = {
    "wrong wild type": (["A1G,1.0"] * 1, "got M at 1"),
    "beyond the end": (["A999G,1.0"], "got nothing at 999"),
    "not a mutant": (["wild,1.0"], "substitutions such as A24G"),
    "NaN": (["M1G,nan"], "finite score"),
    "text": (["M1G,high"], "finite score required, got 'high' in TOY.csv, line 2"),
    "few": (["M1G,1.0"], "at least 20 mutants"),
    "twice": (["M1G,1.0", "M1G,2.0"], "each mutant once"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_assay(tmp_path, case):
    lines, message = BAD[case]
    with pytest.raises(InputError, match=message):
        read_assay(write_assay(tmp_path / "dms", lines=lines))


def test_missing_parts(tmp_path):
    with pytest.raises(InputError, match="at least one assay"):
        read_assays(tmp_path)
    path = write_assay(tmp_path / "dms")
    path.write_text("mutation,fitness\nM1G,1\n")
    with pytest.raises(InputError, match="columns mutant and score"):
        read_assay(path)
    path.with_suffix(".fasta").unlink()
    with pytest.raises(InputError, match=r"wild type of TOY\.csv required"):
        read_assay(path)
