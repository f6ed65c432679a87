"""The command `distil-rank compress head`: folders that load, and one-line errors."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distil_rank
from distil_rank.__main__ import main
from distil_rank.compress.command_head import Config, parse_bytes, read_rows
from distil_rank.core import latency
from distil_rank.proteins.embedding_files import rows_in


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The state dict of a head, its data and its labels; timed in little time."""
    monkeypatch.setattr(latency, "SAMPLE_MS", 0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Sequential(
            nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 1)
        )
    state = {f"head.{k}": v for k, v in head.state_dict().items()}
    save_file(state, tmp_path / "head.safetensors")
    x = torch.randn(120, 40, generator=torch.Generator().manual_seed(0))
    x *= torch.linspace(3, 0.1, 40)
    torch.save(x, tmp_path / "x.pt")
    np.save(tmp_path / "y.npy", head(x)[:, 0].detach().numpy())
    return tmp_path, head, x


def compress(folder, *flags, head="head.safetensors", key=("head.0",), train="x.pt", out="small"):
    keys = ["--key", *key] if key else []
    paths = ["--train", str(folder / train), "--out", str(folder / out)]
    main(["compress", "head", str(folder / head), *keys, *paths, *map(str, flags)])
    return folder / out


def read(out):
    return json.loads((out / "certificate.json").read_text())


def test_a_head_with_labels_twice(files, capsys):
    folder, head, x = files
    options = ["--labels", folder / "y.npy", "--held-out", 0.2, "--speedup", 2]
    options += ["--activation", "gelu"]
    out = compress(folder, *options, key=("head",))
    text = capsys.readouterr().out
    assert text.startswith("kept of the function: Spearman") and "held-out FVU" in text
    small = distil_rank.load(out)
    certificate = read(out)
    assert certificate["task"]["metric"] == "Spearman" and certificate["task"]["rows"] == 24
    assert certificate["flops_ratio"] >= 2 and certificate["data"]["n_train"] == 96
    y = head(x).detach()
    assert float((small(x) - y).square().sum() / (y - y.mean(0)).square().sum()) < 0.2
    readme = (out / "README.md").read_text()
    assert 'distil_rank.load("small")' in readme and len(readme.splitlines()) == 5
    names = {f.name for f in out.iterdir()}
    assert names == {"README.md", "certificate.json", "compressed.json", "model.safetensors"}
    again = (out / "model.safetensors").read_bytes()
    compress(folder, *options, key=("head",))
    assert (out / "model.safetensors").read_bytes() == again
    repeated = read(out)
    for name in certificate["machine_dependent"]:
        certificate.pop(name), repeated.pop(name)
    assert certificate == repeated
    # with --val the labels are its own
    own = ["--val", folder / "x.pt", "--labels", folder / "y.npy", "--rank", 4]
    out = compress(folder, *own, "--activation", "gelu", key=("head",))
    assert read(out)["task"]["rows"] == 120


def test_a_head_as_one_student(files):
    folder, _, x = files
    flags = ["--activation", "gelu", "--held-out", 0.3, "--metric"]
    out = compress(folder, "--rank", 1, *flags, "whole", key=("head",))
    small, found = distil_rank.load(out), read(out)
    kept = found["kept"]["spearman"]["value"]
    assert small[0].rank == 1 and small(x).shape == (120, 1) and kept > 0.7
    assert found["function"]["held_out_achieved_fvu"] == pytest.approx(
        found["output_fvu"]["held_out"]["value"], rel=1e-3
    )
    assert found["flops_ratio"] > 90
    for size in (["--bytes", "1k"], ["--bytes", "1k", "--int8"], ["--fvu", 0.9]):
        out = compress(folder, *size, *flags, "whole", key=("head",))
        found = read(out)
        assert found["bytes_after"] <= 1000 and distil_rank.load(out)(x).shape == (120, 1)
    out = compress(folder, "--bytes", "2k", *flags, "narrow", key=("head",))
    found = read(out)
    assert found["bytes_after"] <= 2000 and distil_rank.load(out)(x).shape == (120, 1)
    assert found["layers"][0]["held_out_achieved_fvu"] == pytest.approx(
        found["output_fvu"]["held_out"]["value"], rel=1e-3
    )


@pytest.mark.parametrize(
    "request_", [["--rank", 6], ["--fvu", 0.1], ["--bytes", "2k"], ["--bytes", "2k", "--int8"]]
)
def test_a_layer_by_key(files, request_):
    folder, _, x = files
    out = compress(folder, *request_)
    assert distil_rank.load(out)(x).shape == (120, 48)
    layer = read(out)["layers"][0]
    assert layer["held_out_floor_fvu"] <= layer["held_out_achieved_fvu"]
    assert layer["rank_curve"]["rank"][0] == 1


def test_a_layer_with_a_prior(files):
    folder, _, x = files
    main(["moments", str(folder / "x.pt"), "--out", str(folder / "prior.safetensors")])
    torch.save(x[:20], folder / "few.pt")
    out = compress(folder, "--rank", 6, "--prior", folder / "prior.safetensors", train="few.pt")
    assert read(out)["prior"]["weight"] > 0


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        (["--rank", 4], {"key": ("nope",)}, "key 'nope'"),
        (["--rank", 4], {"key": ("head",)}, "--activation"),
        (["--rank", 4, "--activation", "relu"], {"key": ("head.2", "head.0")}, "(n, 48)"),
        (["--rank", 4], {"key": ("head.0", "head.0")}, "fit together"),
        (["--rank", 4], {"head": "norm.safetensors", "key": ()}, "(d_out, d_in) required"),
        (["--rank", 2], {"head": "inf.safetensors", "key": ()}, "finite weight"),
        (["--rank", 4], {"head": "absent.pt"}, "absent.pt"),
        ([], {}, "exactly one"),
        (["--bytes", "some"], {}, "400k"),
        (["--bytes", "10"], {}, "bytes"),
        (["--rank", 4, "--held-out", 0], {}, "--held-out"),
        (["--rank", 4, "--device", "tpu"], {}, "--device"),
        (["--rank", 4], {"out": "x.pt/small"}, "writable"),
        (["--rank", 4], {"train": "nan.pt"}, "3 of 120"),
        (["--rank", 4], {"train": "narrow.pt"}, "(n, 40)"),
        (["--rank", 4], {"train": "three.pt"}, "2 rows"),
        (["--rank", 4, "--labels", "y.npy"], {}, "48 outputs"),
        (["--rank", 4, "--prior", "x.pt"], {}, "moments required"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(files, capsys, flags, options, message):
    folder, _, x = files
    broken = x.clone()
    broken[:3, 0] = float("nan")
    torch.save(broken, folder / "nan.pt")
    torch.save(x[:, :30], folder / "narrow.pt")
    torch.save(x[:3], folder / "three.pt")
    save_file({"norm.weight": torch.ones(4)}, folder / "norm.safetensors")
    save_file({"layer.weight": torch.full((4, 40), float("inf"))}, folder / "inf.safetensors")
    before = sorted(f.name for f in folder.iterdir())
    flags = [folder / flag if flag in ("x.pt", "y.npy") else flag for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        compress(folder, *flags, **options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and message in error
    assert sorted(f.name for f in folder.iterdir()) == before


def test_sizes_in_bytes():
    sizes = [parse_bytes(t) for t in ("400k", "2M", "1.5MB", "120000")]
    assert sizes == [400_000, 2_000_000, 1_500_000, 120_000]


def test_copies_of_a_held_out_protein_are_not_fitted_on(files):
    folder, _, x = files
    torch.save(torch.cat([x, x]), folder / "twice.pt")
    config = Config(folder / "head.safetensors", folder / "small", train=folder / "twice.pt")
    fitted, held_out, _ = read_rows(config)
    assert len(held_out) == 24 and not rows_in(fitted, held_out).any()
    assert rows_in(torch.cat([x, x]), fitted).all() and len(fitted) > 180
