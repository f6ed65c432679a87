import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distil_rank.core.errors import InputError
from distil_rank.proteins.embedding_files import load_matrix, provenance

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def save(path, x):
    if path.suffix == ".pt":
        torch.save(x, path)
    elif path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".npz":
        np.savez(path, X=x.numpy(), y=np.zeros(6), seq=np.array(["MKV"] * 6, dtype=object))
    else:
        save_file({"X": x, "y": torch.zeros(6)}, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_format_and_float_dtype(tmp_path, suffix, dtype):
    dtype = getattr(torch, dtype)
    if dtype == torch.bfloat16 and suffix.startswith(".np"):
        pytest.skip("NumPy has no bfloat16")
    loaded = load_matrix(save(tmp_path / f"x{suffix}", X.to(dtype)))
    assert loaded.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(loaded, X.to(dtype).to(loaded.dtype))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), r"got shape \(3,\)"),
        (torch.zeros(3, 2, 2), "pool residues"),
        (torch.zeros(1, 4), "at least 2 rows"),
        (torch.zeros(4, 0), r"got shape \(4, 0\)"),
        (torch.zeros(4, 2, dtype=torch.int64), "floating-point embeddings required"),
        (torch.tensor([[1.0, float("nan")], [0, 0], [float("inf"), 0]]), "2 of 3 rows"),
        ({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, "one named X"),
        ([torch.zeros(2, 2)], "a tensor"),
        ({}, "one tensor"),
    ],
)
def test_what_is_not_a_matrix_is_refused_with_a_reason(tmp_path, x, message):
    torch.save(x, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message) as error:
        load_matrix(tmp_path / "x.pt")
    assert "x.pt" in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz", ".safetensors"])
def test_unreadable_files_are_refused(tmp_path, suffix):
    (tmp_path / f"bad{suffix}").write_bytes(b"PK not really")
    with pytest.raises(InputError, match="readable"):
        load_matrix(tmp_path / f"bad{suffix}")


def test_arrays_without_x_and_objects_are_refused(tmp_path):
    np.savez(tmp_path / "y.npz", y=np.zeros(3), z=np.zeros(3))
    np.save(tmp_path / "o.npy", np.array([{}, {}], dtype=object))
    for name, message in (("y.npz", "X"), ("o.npy", "readable")):
        with pytest.raises(InputError, match=message):
            load_matrix(tmp_path / name)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_executed(tmp_path):
    mark = tmp_path / "executed"
    torch.save(Bomb(mark), tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    for name in ("bomb.pt", "plain.pt"):
        with pytest.raises(InputError):
            load_matrix(tmp_path / name)
    assert not mark.exists()


def test_provenance_is_read_beside_the_matrix(tmp_path):
    assert provenance(tmp_path / "x.pt") == {}
    (tmp_path / "embeddings.json").write_text(json.dumps({"model": "nano-64"}))
    assert provenance(tmp_path / "x.pt") == {"model": "nano-64"}
    (tmp_path / "embeddings.json").write_text("{")
    with pytest.raises(InputError, match="JSON"):
        provenance(tmp_path / "x.pt")
