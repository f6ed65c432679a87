"""Mutational scans: read with care, scored one masked position at a time."""

from pathlib import Path

import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator
from distil_rank.proteins import variants
from distil_rank.proteins.fasta import AMINO_ACIDS
from distil_rank.proteins.variants import (
    masked_marginals,
    read_assay,
    read_assays,
    wild_type_marginals,
)
from tests.proteins import reference

WILD_TYPE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK"


def write_assay(folder: Path, name="TOY", lines=None, wild_type=WILD_TYPE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.fasta").write_text(f">{name}\n{wild_type}\n")
    (folder / f"{name}.csv").write_text("mutant,score\n" + "\n".join(lines or synthetic()) + "\n")
    return folder / f"{name}.csv"


def synthetic(seed=0, per_site=6) -> list[str]:
    """Scores = a strong effect of the position, a small one of the substitution, noise."""
    draw = generator(seed, "synthetic")
    site = torch.randn(len(WILD_TYPE), generator=draw)
    letter = 0.3 * torch.randn(20, generator=draw)
    lines = []
    for p, old in enumerate(WILD_TYPE):
        for a in torch.randperm(20, generator=draw)[:per_site].tolist():
            if AMINO_ACIDS[a] != old:
                score = site[p] + letter[a] + 0.3 * torch.randn((), generator=draw)
                lines.append(f"{old}{p + 1}{AMINO_ACIDS[a]},{float(score):.6f}")
    return lines


def test_subsample_is_seeded_and_in_file_order(tmp_path):
    path = write_assay(tmp_path / "dms")
    whole, one, two = read_assay(path), read_assay(path, 50), read_assay(path, 50)
    assert one.mutants == two.mutants != read_assay(path, 50, seed=1).mutants
    assert len(one.mutants) == 50 and one.measured == len(whole.mutants)
    assert [m for m in whole.mutants if m in set(one.mutants)] == one.mutants
    at = whole.mutants.index(one.mutants[7])
    assert whole.scores[at] == one.scores[7] and whole.sequences[at] == one.sequences[7]


OFFICIAL = """mutant,mutated_sequence,DMS_score,fold_random_5,fold_modulo_5,fold_contiguous_5
A1C,CCDE,0.5,3,0,0
C2G:E4K,AGDK,-1.5,1,1,4
D3W,ACWE,2,0,2,2
"""
TOLD = (
    "DMS_id,DMS_filename,UniProt_ID,target_seq,coarse_selection_type\nX_Y_2020,X,X_Y,ACDE,Binding\n"
)


@pytest.mark.parametrize("place", [None, "in/DMS_substitutions.csv", "DMS_substitutions.csv"])
def test_official_files_are_read_as_they_are(tmp_path, place):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "X_Y_2020.csv").write_text(OFFICIAL)
    if place:
        (tmp_path / place).write_text(TOLD)
    (assay,) = read_assays(tmp_path / "in", least=3)
    assert assay.wild_type == "ACDE" and assay.sequences == ["CCDE", "AGDK", "ACWE"]
    assert assay.positions == [[0], [1, 3], [2]] and assay.scores.tolist() == [0.5, -1.5, 2.0]
    assert {scheme: fold.tolist() for scheme, fold in assay.folds.items()} == {
        "random": [3, 1, 0],
        "modulo": [0, 1, 2],
        "contiguous": [0, 4, 2],
    }
    assert (assay.protein, assay.function) == (("X_Y", "Binding") if place else ("", ""))
    (half,) = read_assays(tmp_path / "in", limit=2, least=3)
    kept = [assay.mutants.index(mutant) for mutant in half.mutants]
    assert half.folds["random"].tolist() == assay.folds["random"][kept].tolist()


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("CCDE", "CCDD", "the wild type with A1C required as mutated_sequence"),
        ("0.5,3", "0.5,", "finite fold required, got '' in .*line 2"),
    ],
)
def test_bad_official_files(tmp_path, good, bad, message):
    (tmp_path / "X_Y_2020.csv").write_text(OFFICIAL.replace(good, bad))
    (tmp_path / "DMS_substitutions.csv").write_text(TOLD)
    with pytest.raises(InputError, match=message):
        read_assays(tmp_path, least=3)


def test_real_assays(shared_data):
    assays = read_assays(shared_data / "dms", limit=40)
    assert len(assays) == 12 and sum(a.measured for a in assays) == 22949
    for assay in assays:
        for sequence, (p, *_), mutant in zip(assay.sequences, assay.positions, assay.mutants):
            assert sequence[p] == mutant[-1] and len(sequence) == len(assay.wild_type)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["A1G,1.0"], "got M at 1"),
        (["A999G,1.0"], "got nothing at 999"),
        (["M0G,1.0"], "got nothing at 0"),
        (["wild,1.0"], "substitutions such as A24G"),
        (["M1*,1.0"], "substitutions such as A24G"),
        (["M1G:M1W,1.0"], "each position once"),
        (["M1G,nan"], "finite score"),
        (["M1G,high"], r"finite score required, got 'high' in TOY\.csv, line 2"),
        (["M1G"], "finite score required, got ''"),
        (["M1G,1.0"], "at least 20 mutants"),
        (
            ["M1G,1.0", "K2G,1.0", "M1G,2.0"],
            r"each mutant once required, got M1G 2 times",
        ),
    ],
)
def test_bad_assays_are_refused_with_the_row(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        read_assay(write_assay(tmp_path / "dms", lines=lines))


def test_missing_parts(tmp_path):
    with pytest.raises(InputError, match="at least one assay"):
        read_assays(tmp_path)
    path = write_assay(tmp_path / "dms")
    path.write_text("mutation,fitness\nM1G,1\n")
    with pytest.raises(InputError, match="columns mutant and score"):
        read_assay(path)
    write_assay(tmp_path / "dms").with_suffix(".fasta").unlink()
    with pytest.raises(InputError, match=r"wild type of TOY\.csv required"):
        read_assay(path)


@pytest.mark.parametrize("masked", [True, False])
def test_marginals_are_log_odds_with_one_position_masked_or_none(ours, masked):
    sequence = "MKTAYIAKQR"
    marginals = masked_marginals if masked else wild_type_marginals
    found = marginals(ours, sequence, batch_tokens=40)
    expected = [reference.log_odds(ours, sequence, i, masked) for i in range(len(sequence))]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    some = masked_marginals(ours, sequence, places=[3, 8])
    assert some.isnan().all(1).nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 7, 9]


def test_a_long_protein_is_read_around_each_position(ours, monkeypatch):
    """In windows that end with the protein; the first and last hold <cls> and <eos>."""
    monkeypatch.setattr(variants, "WINDOW", 8)
    sequence = "MKTAYIAKQRGDNEFHWLVC"  # 22 tokens
    masked = masked_marginals(ours, sequence, batch_tokens=20)
    plain = wild_type_marginals(ours, sequence, places=[0, 9, 19])
    assert plain.isnan().all(1).nonzero().flatten().tolist() == [*range(1, 9), *range(10, 19)]
    for place, start in ((0, 0), (9, 6), (19, 14)):
        for found, hidden in ((masked, True), (plain, False)):
            window = slice(start, start + 8)
            expected = reference.log_odds(ours, sequence, place, hidden, window)
            torch.testing.assert_close(found[place], expected, rtol=1e-5, atol=1e-5)
