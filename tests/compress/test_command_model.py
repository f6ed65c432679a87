"""The command `distil-rank compress model`: folders that load, reports, one-line errors."""

import json

import numpy as np
import pytest
import torch

import distil_rank
from distil_rank.__main__ import main
from distil_rank.compress import command_model
from distil_rank.compress.quantise import on_integers
from distil_rank.compress.report import draw
from distil_rank.core import latency
from distil_rank.core.resume import Checkpoint
from distil_rank.proteins.checkpoints import save_model
from tests.compress.small_models import small_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small checkpoint and twelve proteins; timed in little time, without a figure."""
    monkeypatch.setattr(latency, "SAMPLE_MS", 0.1)
    monkeypatch.setattr(command_model, "draw", lambda folder: None)
    save_model(small_model("esm2"), tmp_path / "nano.pt")
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    random = np.random.default_rng(0)
    fasta = "".join(f">p{i}\n{''.join(random.choice(letters, 20 + i))}\n" for i in range(12))
    (tmp_path / "proteins.fasta").write_text(fasta)
    return tmp_path


def compress(folder, *flags, model="nano.pt", fasta="proteins.fasta", out="small"):
    paths = ["--fasta", str(folder / fasta), "--out", str(folder / out)]
    known = str(folder / model) if (folder / model).exists() else model
    main(["compress", "model", known, *paths, "--ratio", "0.5", "--held-out", "0.2", *flags])
    return folder / out


def record(out):
    return json.loads((out / "report.json").read_text())


def refused(folder, capsys, message, *arguments, **options):
    """One line that says `message`, status 2, and nothing is written."""
    before = sorted(f.name for f in folder.iterdir())
    with pytest.raises(SystemExit) as stopped:
        compress(folder, *arguments, **options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    lines = [line for line in error.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and message in lines[0], (message, error)
    assert sorted(f.name for f in folder.iterdir()) == before


def test_a_model_with_everything(folder, capsys, monkeypatch):
    monkeypatch.setattr(command_model, "draw", draw)
    dms, moments = folder / "dms", str(folder / "moments.safetensors")
    dms.mkdir()
    (dms / "a.fasta").write_text(">w\nMKTAYIAKQR\n")
    (dms / "a.csv").write_text("mutant,score\nM1A,1\nK2A,2\nT3A,0\nA4C,3\n")
    flags = ("--sequential", "--recover", "4", "--int4", "--dms", str(dms))
    out = compress(folder, *flags, "--moments-out", moments)
    assert "pseudo-perplexity" in capsys.readouterr().out
    model = distil_rank.load(out)
    assert model(torch.tensor([[0, 5, 6, 2]])).logits.shape == (1, 4, 33)
    report = record(out)
    assert len(report["recovery_loss"]) == 4 and report["quantisation"]["bits"] == 4
    assert report["mutations"]["assays"]["a"]["mutants"] == 4
    assert report["data"]["n_train"] == 10 and report["evaluation"]["proteins"] == 2
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert not [f for f in folder.iterdir() if "tmp" in f.name or "recovery" in f.name]
    second = record(compress(folder, "--prior", moments, out="second"))
    assert any(x["prior_weight"] is not None for x in second["compression"]["layers"])


def test_a_folder_is_never_larger_than_its_float16_source(folder):
    out = compress(folder)
    cost = record(out)["cost"]
    assert cost["bytes_before"] == (folder / "nano.pt").stat().st_size
    assert cost["bytes_after"] == (out / "model.safetensors").stat().st_size
    assert cost["bytes_after"] < cost["bytes_before"]
    assert next(distil_rank.load(out).parameters()).dtype == torch.float32


def test_a_foreign_recovery_is_refused_before_the_work(folder, capsys, monkeypatch):
    Checkpoint(folder / ".small.recovery.pt", "another request").save({})
    monkeypatch.setattr(command_model, "compress_model", None)
    refused(folder, capsys, "very request", "--recover", "3")


def test_a_recovery_with_another_prior_is_refused(folder, capsys, monkeypatch):
    moments = folder / "moments.safetensors"
    compress(folder, "--moments-out", str(moments), out="first")

    def killed(*arguments):
        arguments[-1].save({})
        raise KeyboardInterrupt

    monkeypatch.setattr(command_model, "recover", killed)
    flags = ("--recover", "3", "--prior", str(moments))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        compress(folder, *flags)
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # goes on
        compress(folder, *flags)
    compress(folder, "--moments-out", str(moments), "--held-out", "0.5", out="first")
    capsys.readouterr()
    refused(folder, capsys, "very request", *flags)


def test_two_runs_are_equal(folder):
    runs = [compress(folder, "--recover", "3", out=name) for name in ("first", "second")]
    assert len({(out / "model.safetensors").read_bytes() for out in runs}) == 1
    assert len({json.dumps(record(out)["evaluation"]) for out in runs}) == 1


@pytest.mark.parametrize("name", ["EsmForSequenceClassification", "EsmForTokenClassification"])
def test_a_classifier_keeps_its_head_and_runs_anywhere(folder, name):
    import transformers

    small_model(name).save_pretrained(folder / "hf")
    out = compress(folder, "--merge", "--onnx", "--int8", model="hf")
    plain = getattr(transformers, name).from_pretrained(out / "merged").eval()
    tokens = torch.tensor([[0, 5, 6, 7, 2]])
    small = on_integers(distil_rank.load(out), False)  # as what is merged or exported
    with torch.no_grad():
        expected = small(tokens).logits
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out)("LA")["input_ids"] == [0, 4, 5, 2]
    assert (out / "model.onnx").is_file()
    report = record(out)
    assert any(x["rank"] and "classifier" not in x["name"] for x in report["compression"]["layers"])
    assert report["evaluation"]["logits_kl"]["value"] >= 0


def test_held_out_proteins_are_not_among_the_fitted_ones(folder, capsys):
    path = folder / "proteins.fasta"
    records = path.read_text()
    path.write_text(records + records.lower())  # the same residues
    found = record(compress(folder))["data"]
    assert (found["n_train"], found["n_val"]) == (10, 2)
    assert "12 proteins left out" in capsys.readouterr().err
    (folder / "tests.fasta").write_text(records + ">new\nMKTAYIAKQRQISFVK\n>other\nGAVLMKT\n")
    held_out = ("--held-out-fasta", str(folder / "tests.fasta"))
    assert record(compress(folder, *held_out))["data"]["n_val"] == 2
    assert "12 held-out proteins left out" in capsys.readouterr().err
    refused(folder, capsys, "another one", "--held-out-fasta", str(path))


def test_bad_input_is_one_line_and_nothing_is_written(folder, capsys):
    (folder / "empty.fasta").write_text("")
    (folder / "one.fasta").write_text(">a\nMKT\n")
    cases = [
        (("--ratio", "0"), "--ratio"),
        (("--ratio", "1.2"), "--ratio"),
        (("--held-out", "1"), "--held-out"),
        (("--max-length", "0"), "--max-length"),
        (("--recover", "-1"), "--recover"),
        (("--device", "tpu"), "--device"),
        (("--exclude", "*"), "pattern"),
        (("--int8", "--int4"), "leave one out"),
        (("--dms", str(folder / "none")), "assay"),
        (("--prior", str(folder / "proteins.fasta")), "moments"),
    ]
    for flags, message in cases:
        refused(folder, capsys, message, *flags)
    for fasta, message in (("empty", "empty.fasta"), ("one", "protein"), ("none", "none.fasta")):
        refused(folder, capsys, message, fasta=f"{fasta}.fasta")
    refused(folder, capsys, "no-such-model", model="no-such-model")
    below = str(folder / "proteins.fasta" / "moments.safetensors")
    refused(folder, capsys, "writable", "--moments-out", below)
    refused(folder, capsys, "is a folder", "--moments-out", str(folder))
    for out in ("proteins.fasta", "proteins.fasta/small"):
        refused(folder, capsys, "writable", out=out)
