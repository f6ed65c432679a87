"""The command `distil-rank compress`: folders that load, reports, and one-line errors with nothing written."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distil_rank
from distil_rank.__main__ import main
from distil_rank.compress.compress import parse_bytes
from distil_rank.proteins.pretrain import save_checkpoint
from tests.compress.small_models import small_model


@pytest.fixture
def files(tmp_path):
    """A head's state dict, its data and labels, a small checkpoint and proteins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 1))
    save_file({f"head.{k}": v for k, v in head.state_dict().items()}, tmp_path / "head.safetensors")
    source = torch.Generator().manual_seed(0)
    x = torch.randn(120, 40, generator=source) * torch.linspace(3, 0.1, 40)
    torch.save(x, tmp_path / "x.pt")
    with torch.no_grad():
        np.save(tmp_path / "y.npy", head(x)[:, 0].numpy())
    save_checkpoint(small_model("fair-esm"), tmp_path / "nano.pt")
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    random = np.random.default_rng(0)
    fasta = "".join(f">p{i}\n{''.join(random.choice(letters, 20 + i))}\n" for i in range(12))
    (tmp_path / "proteins.fasta").write_text(fasta)
    return tmp_path, head, x


def test_a_head_with_labels_and_onnx(files, capsys):
    folder, head, x = files
    arguments = [
        str(folder / "head.safetensors"),
        "--key",
        "head",
        "--activation",
        "gelu",
        "--data",
        str(folder / "x.pt"),
    ]
    arguments += [
        "--labels",
        str(folder / "y.npy"),
        "--speedup",
        "2",
        "--metric",
        "output",
        "--onnx",
        "--out",
        str(folder / "small"),
    ]
    main(["compress", *arguments])
    text = capsys.readouterr().out
    assert "Spearman" in text and "held-out FVU" in text
    small = distil_rank.load(folder / "small")
    certificate = json.loads((folder / "small" / "certificate.json").read_text())
    assert certificate["task"]["metric"] == "Spearman" and certificate["task"]["rows"] == 24
    assert certificate["flops_ratio"] >= 2 and certificate["data"]["n_train"] == 96
    fvu = float(((small(x) - head(x)).square().sum() / (head(x) - head(x).mean(0)).square().sum()).detach())
    assert fvu < 0.2
    assert (folder / "small" / "model.onnx").is_file()
    readme = (folder / "small" / "README.md").read_text()
    assert 'distil_rank.load("small")' in readme and len(readme.splitlines()) == 5
    again = (folder / "small" / "model.safetensors").read_bytes()
    main(["compress", *arguments])
    assert (folder / "small" / "model.safetensors").read_bytes() == again


@pytest.mark.parametrize(
    "request_", [["--rank", "6"], ["--fvu", "0.05"], ["--bytes", "2k"], ["--bytes", "2k", "--int8"]]
)
def test_a_layer_by_key(files, request_):
    folder, _, x = files
    out = folder / "small"
    target = [str(folder / "head.safetensors"), "--key", "head.0", "--data", str(folder / "x.pt"), "--out", str(out)]
    main(["compress", *target, *request_])
    assert distil_rank.load(out)(x).shape == (120, 48)
    layer = json.loads((out / "certificate.json").read_text())["layers"][0]
    assert layer["held_out_floor_fvu"] <= layer["held_out_achieved_fvu"]
    assert layer["rank_curve"]["rank"][0] == 1


def test_a_layer_with_a_prior(files):
    folder, _, x = files
    main(["moments", str(folder / "x.pt"), "--out", str(folder / "prior.safetensors")])
    torch.save(x[:20], folder / "few.pt")
    target = [str(folder / "head.safetensors"), "--key", "head.0", "--data", str(folder / "few.pt"), "--rank", "6"]
    main(["compress", *target, "--prior", str(folder / "prior.safetensors"), "--out", str(folder / "small")])
    assert json.loads((folder / "small" / "certificate.json").read_text())["prior"]["weight"] > 0


def test_a_model_with_everything(files, capsys):
    folder, _, _ = files
    out, dms = folder / "small", folder / "dms"
    dms.mkdir()
    (dms / "a.fasta").write_text(">w\nMKTAYIAKQR\n")
    (dms / "a.csv").write_text("mutant,score\nM1A,1\nK2A,2\nT3A,0\nA4C,3\n")
    arguments = [
        str(folder / "nano.pt"),
        "--calibration",
        str(folder / "proteins.fasta"),
        "--ratio",
        "0.5",
        "--out",
        str(out),
    ]
    arguments += ["--sensitivity", "--sequential", "--recover", "4", "--int8", "--dms", str(dms)]
    arguments += ["--moments-out", str(folder / "moments.safetensors")]
    main(["compress", *arguments])
    assert "pseudo-perplexity" in capsys.readouterr().out
    model = distil_rank.load(out)
    assert model(torch.tensor([[0, 5, 6, 2]]))["logits"].shape == (1, 4, 33)
    report = json.loads((out / "report.json").read_text())
    assert len(report["recovery_loss"]) == 4 and report["int8"] and report["mutations"]["assays"]["a"]["mutants"] == 4
    assert report["data"]["n_train"] == 10 and report["evaluation"]["proteins"] == 2
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert not [f for f in folder.iterdir() if "tmp" in f.name or "recovery" in f.name]
    prior = ["--prior", str(folder / "moments.safetensors")]
    main(["compress", *arguments[:5], "--out", str(folder / "second"), *prior])
    layers = json.loads((folder / "second" / "report.json").read_text())["compression"]["layers"]
    assert any(x["prior_weight"] is not None for x in layers)


def test_a_hugging_face_model_is_exported_dense(files):
    import transformers

    folder, _, _ = files
    small_model("EsmForMaskedLM").save_pretrained(folder / "hf")
    out = folder / "small"
    main(
        [
            "compress",
            str(folder / "hf"),
            "--calibration",
            str(folder / "proteins.fasta"),
            "--ratio",
            "0.5",
            "--merge",
            "--out",
            str(out),
        ]
    )
    plain = transformers.EsmForMaskedLM.from_pretrained(out / "merged").eval()
    tokens = torch.tensor([[0, 5, 6, 7, 2]])
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, distil_rank.load(out)(tokens).logits, rtol=1e-5, atol=1e-5)


def test_bad_input_is_one_line_and_nothing_is_written(files, capsys):
    folder, _, x = files
    broken = x.clone()
    broken[:3, 0] = float("nan")
    torch.save(broken, folder / "nan.pt")
    torch.save(x[:, :30], folder / "narrow.pt")
    torch.save(x[:3], folder / "three.pt")
    save_file({"norm.weight": torch.ones(4)}, folder / "norm.safetensors")
    save_file({"layer.weight": torch.full((4, 40), float("inf"))}, folder / "inf.safetensors")
    (folder / "empty.fasta").write_text("")
    (folder / "one.fasta").write_text(">a\nMKT\n")
    head, data, proteins = (str(folder / name) for name in ("head.safetensors", "x.pt", "proteins.fasta"))
    nano = str(folder / "nano.pt")
    layer = [head, "--key", "head.0", "--data", data]
    cases = [
        ([head, "--key", "nope", "--data", data, "--rank", "4"], "key 'nope'"),
        ([head, "--key", "head", "--data", data, "--rank", "4"], "--activation"),
        ([head, "--key", "head.2", "head.0", "--activation", "relu", "--data", data, "--rank", "4"], "48"),
        ([str(folder / "norm.safetensors"), "--data", data, "--rank", "4"], "at least one linear layer"),
        ([str(folder / "inf.safetensors"), "--data", data, "--rank", "2"], "finite weights"),
        ([str(folder / "absent.pt"), "--data", data, "--rank", "4"], "absent.pt"),
        ([head, "--key", "head.0", "--rank", "4"], "--data"),
        ([*layer, "--calibration", proteins, "--rank", "4"], "both"),
        (layer, "exactly one"),
        ([*layer, "--rank", "4", "--fvu", "0.1"], "exactly one"),
        ([*layer, "--rank", "0"], "rank"),
        ([*layer, "--fvu", "2"], "fvu"),
        ([*layer, "--bytes", "some"], "400k"),
        ([*layer, "--bytes", "10"], "bytes"),
        ([*layer, "--rank", "4", "--ratio", "0.5"], "--ratio"),
        ([*layer, "--rank", "4", "--held-out", "0"], "--held-out"),
        ([head, "--key", "head.0", "--data", str(folder / "nan.pt"), "--rank", "4"], "3 of 120"),
        ([head, "--key", "head.0", "--data", str(folder / "narrow.pt"), "--rank", "4"], "(n, 40)"),
        ([head, "--key", "head.0", "--data", str(folder / "three.pt"), "--rank", "4"], "2 rows"),
        ([*layer, "--rank", "4", "--labels", str(folder / "y.npy")], "48 outputs"),
        ([*layer, "--rank", "4", "--prior", proteins], "prior"),
        ([*layer, "--rank", "4", "--val-labels", str(folder / "y.npy")], "--val required"),
        ([nano, "--calibration", proteins], "--ratio"),
        ([nano, "--calibration", proteins, "--ratio", "0"], "--ratio"),
        ([nano, "--calibration", proteins, "--ratio", "1.2"], "--ratio"),
        ([nano, "--calibration", proteins, "--ratio", "0.5", "--rank", "4"], "--rank"),
        ([nano, "--calibration", proteins, "--ratio", "0.5", "--merge"], "--merge"),
        ([nano, "--calibration", proteins, "--ratio", "0.5", "--include", "x"], "pattern"),
        ([nano, "--calibration", proteins, "--ratio", "0.5", "--dms", str(folder / "none")], "assays"),
        ([nano, "--calibration", str(folder / "empty.fasta"), "--ratio", "0.5"], "empty.fasta"),
        ([nano, "--calibration", str(folder / "one.fasta"), "--ratio", "0.5"], "protein"),
        ([nano, "--calibration", str(folder / "none.fasta"), "--ratio", "0.5"], "none.fasta"),
        (["no-such-model", "--calibration", proteins, "--ratio", "0.5"], "no-such-model"),
    ]
    before = sorted(f.name for f in folder.iterdir())
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stopped:
            main(["compress", *arguments, "--out", str(folder / "small")])
        error = capsys.readouterr().err
        assert stopped.value.code == 2, (arguments, error)
        lines = [line for line in error.splitlines() if not line.startswith("note:")]
        assert len(lines) == 1 and message in lines[0], (message, error)
        assert sorted(f.name for f in folder.iterdir()) == before, arguments
    with pytest.raises(SystemExit):
        main(["compress", *layer, "--rank", "4", "--out", str(folder / "x.pt" / "small")])
    assert "writable" in capsys.readouterr().err


def test_sizes_in_bytes():
    assert [parse_bytes(t) for t in ("400k", "2M", "1.5MB", "120000")] == [400_000, 2_000_000, 1_500_000, 120_000]
