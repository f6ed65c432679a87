"""Prepared proteins: every protein once, no relative across parts, nothing trained on in a test."""

import gzip
import json
from itertools import chain

import numpy as np
import pytest

from distil_rank.__main__ import main
from distil_rank.core.errors import InputError
from distil_rank.generators.models import fresh, save
from distil_rank.generators.prepared import PARTS, Prepared
from distil_rank.proteins.splits import near_relatives
from tests.generators.conftest import prepare, write_fasta
from tests.toys import mutated, toy_sequences


def parts(folder):
    prepared = Prepared(folder)
    return [prepared.sequences(part) for part in PARTS if part != "hard"]


def test_every_protein_comes_back_once_in_its_part_and_in_order(tmp_path):
    sequences = toy_sequences(3000, low=5, high=90)
    write_fasta(tmp_path / "a.fasta", sequences + sequences[:50])
    zipped = gzip.compress((tmp_path / "a.fasta").read_bytes())
    (tmp_path / "a.fasta.gz").write_bytes(zipped)
    found = [parts(prepare(tmp_path / f"a.fasta{s}", tmp_path / f"o{s}")) for s in ("", ".gz")]
    assert found[0] == found[1]
    assert sorted(chain(*found[0])) == sorted(sequences)
    for part in found[0]:
        own = set(part)
        assert part == [s for s in sequences if s in own]
    assert [len(part) for part in found[0]] == pytest.approx([1800, 600, 600], abs=80)
    record = json.loads((tmp_path / "o" / "data.json").read_text())
    assert record["read"] == 3050 and record["duplicates"] == 50 and record["too_long"] == 0
    encoded = Prepared(tmp_path / "o").part("train")
    assert encoded.residues.tolist() == [len(s) for s in found[0][0]]
    assert isinstance(encoded.tokens, np.memmap) and encoded.tokens.dtype == np.uint16


def test_the_share_grows_by_inclusion_and_leaves_the_test_alone(tmp_path):
    fasta = write_fasta(tmp_path / "a.fasta", toy_sequences(2000))
    whole, fifth, tenth = (
        parts(prepare(fasta, tmp_path / str(p), train_size_prop=p)) for p in (1.0, 0.2, 0.1)
    )
    assert set(tenth[0]) < set(fifth[0]) < set(whole[0])
    assert len(fifth[0]) == pytest.approx(0.2 * len(whole[0]), rel=0.25)
    assert whole[1:] == fifth[1:] == tenth[1:]


def test_relatives_never_straddle_the_parts_and_a_family_is_split_as_finely_as_it_needs(tmp_path):
    rng = np.random.default_rng(0)
    ancestors = toy_sequences(20, low=90, high=140)
    families = [mutated(s, 0.2, rng) for s in ancestors for _ in range(5)]
    prepare(
        write_fasta(tmp_path / "a.fasta", families), tmp_path / "a", split_by="cluster", context=200
    )
    found = parts(tmp_path / "a")
    assert sorted(chain(*found)) == sorted(families)
    part_of = {sequence: i for i, part in enumerate(found) for sequence in part}
    assert all(part_of[families[a]] == part_of[families[b]] for a, b in near_relatives(families))
    family = list(dict.fromkeys(mutated(ancestors[0], 0.25, rng) for _ in range(60)))
    fasta = write_fasta(tmp_path / "family.fasta", family)
    prepare(fasta, tmp_path / "family", split_by="cluster", held_out=0.1, context=200)
    record = json.loads((tmp_path / "family" / "data.json").read_text())
    assert record["split"]["identity"] > 0.3
    assert min(record["parts"][part]["proteins"] for part in PARTS[:3]) >= 3
    prepare(
        write_fasta(tmp_path / "b.fasta", families + family),
        tmp_path / "both",
        split_by="cluster",
        held_out=0.1,
        context=200,
        identity=0.9,
        hard_identity=0.3,
    )
    hard = Prepared(tmp_path / "both").sequences("hard")
    kept = set(hard)
    assert kept and len(kept) <= 0.1 * 160 + 1
    assert all((families[a] in kept) == (families[b] in kept) for a, b in near_relatives(families))
    with pytest.raises(InputError, match="higher --identity, or --split-by random"):
        prepare(fasta, tmp_path / "no", split_by="cluster", identity=0.3, context=200)
    assert not (tmp_path / "no").exists()


def test_a_listed_split_and_given_proteins_are_kept_whatever_the_other_flags(tmp_path):
    sequences = toy_sequences(220)
    fasta = write_fasta(tmp_path / "a.fasta", sequences[:200])
    first = parts(prepare(fasta, tmp_path / "a"))
    again = prepare(fasta, tmp_path / "b", split_by=str(tmp_path / "a" / "split.json"), seed=5)
    assert parts(again) == first
    hashes = [Prepared(tmp_path / name).record["test_sha256"] for name in "ab"]
    assert hashes[0] == hashes[1]
    for name, more in (("none", {"held_out": 0.0}), ("short", {"context": 40})):
        split = str(prepare(fasta, tmp_path / name, split_by=again / "split.json", **more))
        anew = prepare(fasta, tmp_path / f"{name} again", split_by=f"{split}/split.json")
        assert parts(anew) == first  # also what was too long for a shorter context
    given = sequences[190:]  # ten of them are in the other file too
    held_out = write_fasta(tmp_path / "held_out.fasta", given)
    train, validation, test = parts(prepare(fasta, tmp_path / "c", held_out_fasta=held_out))
    assert train == sequences[:190] and sorted(validation + test) == sorted(given)
    assert len(test) == len(validation)


def test_long_proteins_are_left_out_or_cut_by_tokens_and_counted(tmp_path):
    sequences = ["A" * 92, "C" * 93, "D" * 300, "EFGH"]  # 92: 3 more tokens and 2 line breaks, 97
    fasta = write_fasta(tmp_path / "a.fasta", sequences)
    for crop, wanted in (
        (False, ["A" * 91 + "A", "EFGH"]),
        (True, ["A" * 92, "C" * 93, "D" * 94, "EFGH"]),
    ):
        folder = prepare(fasta, tmp_path / str(crop), context=97, crop=crop, held_out=0.0)
        prepared = Prepared(folder)
        assert prepared.record["too_long"] == 2 and prepared.sequences("train") == wanted
        encoded = prepared.part("train")
        assert encoded.lengths.max() == 97
        assert encoded.residues.tolist() == [len(s) for s in wanted]


def test_a_model_is_only_measured_on_proteins_that_its_training_left_out(tmp_path):
    fasta = write_fasta(tmp_path / "a.fasta", toy_sequences(200))
    prepared = Prepared(prepare(fasta, tmp_path / "a"))
    model = str(tmp_path)
    assert "no record" in prepared.doubts(model)[model]
    (tmp_path / "training.json").write_text(json.dumps({"data": prepared.summary()}))
    assert prepared.doubts(model) == {}
    for name, more in (
        ("seed", {"seed": 1}),
        ("share", {"held_out": 0.1}),
        ("long", {"context": 40}),
    ):
        assert "other" in Prepared(prepare(fasta, tmp_path / name, **more)).doubts(model)[model]
    prepare(fasta, tmp_path / "less", train_size_prop=0.5)
    assert Prepared(tmp_path / "less").doubts(model) == {}
    (tmp_path / "tuned").mkdir()  # what a model started from may have seen the test proteins too
    start = {"name": "elsewhere", "weights_sha256": ""}
    started = {"data": prepared.summary(), "started_from": start}
    (tmp_path / "tuned" / "training.json").write_text(json.dumps(started))
    assert list(prepared.doubts(str(tmp_path / "tuned"))) == ["elsewhere"]


def test_damaged_folders_and_models_that_do_not_fit_are_refused(tmp_path, tokenizer):
    fasta = write_fasta(tmp_path / "a.fasta", toy_sequences(200))
    prepared = Prepared(prepare(fasta, tmp_path / "a"))
    with pytest.raises(InputError, match="--context 64"):
        prepared.training_parts(fresh(27, 1, 1, 8, 64, 0, 0))
    empty = Prepared(prepare(fasta, tmp_path / "b", held_out=0.0))
    with pytest.raises(InputError, match="validate with"):
        empty.training_parts(fresh(27, 1, 1, 8, 128, 0, 0))
    with (tmp_path / "a" / "train.tokens").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(InputError, match="another size"):
        prepared.part("train")
    with pytest.raises(InputError, match=r"data\.json"):
        Prepared(tmp_path)


def test_bad_flags_are_one_line_and_leave_nothing(tmp_path, capsys, tokenizer):
    fasta = write_fasta(tmp_path / "a.fasta", toy_sequences(20))
    (tmp_path / "there").mkdir()
    save(fresh(27, 1, 1, 8, 64, 0, 0), tokenizer, tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    for flags, message in (
        ("--held-out .5", "--held-out"),
        ("--train-size-prop 0", "--train-size-prop"),
        ("--identity 1.5", "--identity"),
        ("--context 3", "--context"),
        ("--split-by none.json", "none.json"),
        ("--split-by random --hard-identity .3", "--split-by cluster"),
        ("--tokenizer none/none/none", "tokenizer"),
        ("--split-by random --context 8", "proteins up to --context 8"),
        ("--out there", "which exists"),
    ):
        out = "" if "--out" in flags else f"--out {tmp_path}/o"
        flags = flags.replace("there", f"{tmp_path}/there")
        with pytest.raises(SystemExit) as stop:
            main(["generator", "prepare", str(fasta), *flags.split(), *out.split()])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert sorted(tmp_path.rglob("*")) == before
