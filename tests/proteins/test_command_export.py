import sys

import numpy as np
import pytest

from distil_rank.core.errors import InputError
from distil_rank.proteins.command_export import PACKAGES, Config, run
from distil_rank.proteins.embedding_files import load_matrix
from distil_rank.proteins.store import EmbeddingStore


def read(path):
    """Vectors (rows, d) and the protein of each row."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as found:
            return found["X"], found["ids"].tolist()
    if path.suffix == ".h5":
        with pytest.importorskip("h5py").File(path) as found:
            return found["X"][:], found["ids"].asstr()[:].tolist()
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    return np.array(table["vector"].to_pylist(), np.float32), table["id"].to_pylist()


@pytest.mark.parametrize("suffix", PACKAGES)
@pytest.mark.parametrize("pool", ["mean", "residues"])
def test_every_vector_beside_the_id_of_its_protein(whole, residues, tmp_path, suffix, pool):
    pytest.importorskip(PACKAGES[suffix])
    path, layer = (residues, 1) if pool == "residues" else (whole, None)
    store = EmbeddingStore(path, layer)
    run(Config(path, tmp_path / f"x{suffix}", layer))
    x, ids = read(tmp_path / f"x{suffix}")
    assert np.array_equal(x, store.to_numpy()) and x.shape == (store.rows, store.dim)
    assert ids == [i for i, v in zip(store.ids, store) for _ in range(v.reshape(-1, 48).shape[0])]
    if suffix == ".npz":
        assert np.array_equal(load_matrix(tmp_path / "x.npz").numpy(), x)


def test_what_cannot_be_written_is_one_sentence(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for store, name, message in [
        (whole, "x.csv", r"a file ending in \.npz, \.h5, \.parquet required"),
        (whole, "x.h5", "the package h5py required"),
        (tmp_path, "x.npz", "store"),
    ]:
        with pytest.raises(InputError, match=message):
            run(Config(store, tmp_path / name))
    assert not list(tmp_path.iterdir())
