"""Mutations scored without training, from a CSV to a CSV."""

import csv
import shutil

import pytest

from distil_rank.core.errors import InputError
from distil_rank.proteins.command_score import Config, run
from distil_rank.proteins.fasta import AMINO_ACIDS
from tests.proteins.reference import log_odds

WILD_TYPE = "MKTAYIAKQRQISFVKSHFSRQ"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "wt.fasta").write_text(f">wt\n{WILD_TYPE}\n")
    (tmp_path / "v.csv").write_text("mutant,note\nA4G,x\nM1W:K2R,y\nA4G,again\n")
    return tmp_path / "v.csv", tmp_path / "wt.fasta", tmp_path / "scores.csv"


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_scores_are_sums_of_log_odds_in_the_order_of_the_file(files, checkpoint, ours):
    variants, fasta, out = files
    run(Config(variants, str(checkpoint), out, wild_type=fasta, device="cpu"))
    rows = read(out)
    assert [row["mutant"] for row in rows] == ["A4G", "M1W:K2R", "A4G"] and rows[0] == rows[2]
    for name, masked in (("masked_marginal", True), ("wild_type_marginal", False)):
        A4G, M1W, K2R = (
            float(log_odds(ours, WILD_TYPE, position, masked)[AMINO_ACIDS.index(letter)])
            for position, letter in ((3, "G"), (0, "W"), (1, "R"))
        )
        expected = [A4G, M1W + K2R]
        assert [float(row[name]) for row in rows[:2]] == pytest.approx(expected, abs=1e-5)


def test_the_wild_type_beside_the_file_or_in_the_reference_gives_the_same(files, checkpoint):
    variants, fasta, out = files
    run(Config(variants, str(checkpoint), out, wild_type=fasta, device="cpu"))
    named = out.read_bytes()
    shutil.copy(fasta, variants.with_suffix(".fasta"))
    run(Config(variants, str(checkpoint), out, device="cpu"))
    assert out.read_bytes() == named
    variants.with_suffix(".fasta").unlink()
    reference = variants.parent / "DMS_substitutions.csv"
    reference.write_text(f"DMS_id,target_seq\nv,{WILD_TYPE}\n")
    run(Config(variants, str(checkpoint), out, device="cpu"))
    assert out.read_bytes() == named
    reference.write_text(f"name,target_seq\nv,{WILD_TYPE}\n")
    with pytest.raises(InputError, match="a column DMS_id required"):
        run(Config(variants, str(checkpoint), out, device="cpu"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mutant\nC4G\n", "residue required in C4G, got A at 4 in v.csv, line 2"),
        ("variant\nA4G\n", "a column mutant required, got variant"),
        ("mutant\nA4G,1\n", "a name for every column"),
        ("mutant\n", "got no rows"),
        (None, "a readable CSV required"),
    ],
)
def test_bad_mutants_are_one_sentence_and_nothing_is_written(files, checkpoint, content, message):
    variants, fasta, out = files
    variants.unlink() if content is None else variants.write_text(content)
    with pytest.raises(InputError, match=message):
        run(Config(variants, str(checkpoint), out, wild_type=fasta, device="cpu"))
    assert not out.exists()


def test_other_bad_input(files, checkpoint, tmp_path):
    variants, fasta, out = files
    (tmp_path / "two.fasta").write_text(">a\nMK\n>b\nMK\n")
    for change, message in [
        ({"wild_type": tmp_path / "two.fasta"}, "one wild type required, got 2"),
        ({"wild_type": tmp_path / "none.fasta"}, "a FASTA file"),
        ({"wild_type": None}, "name it with --wild-type"),
        ({"out": variants, "wild_type": fasta}, "a new file required"),
        ({"out": tmp_path / "." / "wt.fasta", "wild_type": fasta}, "a new file required"),
    ]:
        with pytest.raises(InputError, match=message):
            run(Config(**{"variants": variants, "model": str(checkpoint), "out": out} | change))
