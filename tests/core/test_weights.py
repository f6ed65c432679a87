"""Layers from state dicts, in every form they come in; what is no layer is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distil_rank.core.errors import InputError
from distil_rank.core.heads import load_head
from distil_rank.core.weights import read_state_dict, read_tensors


def load_layer(path, key=None):
    """The one layer of a head."""
    (layer,) = load_head(path, key)
    return layer


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_layer_is_found_by_key(tmp_path, suffix):
    head = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    path = tmp_path / f"head{suffix}"
    prefix = "model." if suffix == ".pt" else ""
    if prefix:
        torch.save({"model": head.state_dict()}, path)
    else:
        save_file(head.state_dict(), path)
    first, last = f"{prefix}0", f"{prefix}2"
    assert torch.equal(load_layer(path, first).weight, head[0].weight)
    assert torch.equal(load_layer(path, f"{first}.weight").bias, head[0].bias)
    assert load_layer(path, last).bias is None
    with pytest.raises(InputError, match="--activation"):
        load_layer(path)
    with pytest.raises(InputError, match=r"key 'classifier' required .* which has layers"):
        load_layer(path, "classifier")


def test_a_single_layer_needs_no_key_and_comes_frozen_in_float32(tmp_path):
    layer = nn.Linear(4, 2).half()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = load_layer(tmp_path / "layer.pt")
    assert loaded.weight.dtype == torch.float32 and not loaded.weight.requires_grad
    torch.testing.assert_close(loaded.weight, layer.weight.float())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(3)}, "d_out, d_in"),
        ({"weight": torch.zeros(3, 2, dtype=torch.int64)}, "floating-point"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, r"bias \(3,\)"),
        ({"weight": torch.full((3, 2), float("nan"))}, "finite"),
        ({"bias": torch.zeros(2)}, "none"),
        (torch.zeros(3, 2), "state dict"),
    ],
)
def test_what_is_no_layer_is_refused(tmp_path, state, message):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        load_layer(tmp_path / "x.pt")


def test_nothing_is_unpickled(tmp_path):
    torch.save({"weight": torch.nn.Linear}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="plain tensors required"):
        read_tensors(tmp_path / "x.pt")
    for name in ("absent.pt", "x.txt"):
        with pytest.raises(InputError, match="required"):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize("text", ["embeddings\n", "MKV\n", ">protein\n", "1,2\n3,4\n", "X\n", ""])
def test_text_named_pt_is_one_line_of_refusal(tmp_path, text):
    (tmp_path / "x.pt").write_text(text)
    with pytest.raises(InputError, match=r"required, got .*x\.pt|required in .*x\.pt"):
        read_tensors(tmp_path / "x.pt")
