import hashlib
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distil_rank.core.errors import InputError
from distil_rank.proteins.command_embed import Config, run
from distil_rank.proteins.fasta import Protein, write_fasta
from distil_rank.proteins.store import EmbeddingStore, new_shard, shard_path
from tests.proteins import reference

IDS = ["../../etc/passwd", "a/b", "twin", "twin", "", "ü{}'\";--", "sp|P1|X", "A" * 300]


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    draw = random.Random(0)
    records = [
        Protein(id, f"{id} words after", reference.random_sequence(draw, 5 + 9 * i))
        for i, id in enumerate(IDS)
    ]
    path = tmp_path_factory.mktemp("odd") / "odd.fasta"
    write_fasta(path, records)
    return path, records


@pytest.fixture(scope="module", params=["mean", "bos", "residues"])
def store(request, proteins, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "s"
    options = {"pool": request.param, "shard_residues": 60, "layers": (1, -1), "device": "cpu"}
    run(Config(proteins[0], str(checkpoint), out, **options))
    return EmbeddingStore(out)


def expected(fair_esm, sequence, pool, layer=3):
    state = reference.hidden(fair_esm, sequence, layer)
    return {"mean": state[1:-1].mean(0), "bos": state[0], "residues": state[1:-1]}[pool]


def test_every_protein_by_position_equals_fair_esm_alone(store, proteins, fair_esm):
    assert len(store) == len(IDS) and store.provenance["shards"] > 2
    for i, protein in enumerate(proteins[1]):
        exact = expected(fair_esm, protein.sequence, store.pool)
        torch.testing.assert_close(store[i], exact, rtol=1e-5, atol=1e-5)


def test_ids_are_data_in_the_order_of_the_file(store, proteins):
    assert store.ids == IDS
    shards = {shard_path(store.path, i).name for i in range(store.provenance["shards"])}
    assert {path.name for path in store.path.iterdir()} == {"store.json", "index.sqlite"} | shards
    sequences = [protein.sequence for protein in proteins[1]]
    assert store.column("length") == list(map(len, sequences))
    digests = [hashlib.sha256(sequence.encode()).hexdigest() for sequence in sequences]
    assert store.column("sha256") == digests
    assert store.column("header") == [protein.header for protein in proteins[1]]
    for i, protein in enumerate(proteins[1]):
        if protein.id != "twin":
            assert torch.equal(store[protein.id], store[i])


def test_repeated_and_unknown_ids_are_not_guessed(store):
    assert store.positions("twin") == [2, 3]
    with pytest.raises(KeyError, match=r"got 2: use store\.positions"):
        store["twin"]
    with pytest.raises(KeyError, match="got 0"):
        store["nobody"]
    assert "twin" in store and "" in store and "../../etc/passwd" in store
    assert "nobody" not in store and 3 not in store
    with pytest.raises(IndexError):
        store[len(IDS)]
    assert torch.equal(store[-1], store[len(IDS) - 1])


def same(one, other) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_slices_and_several_keys(store):
    each = [store[i] for i in range(len(store))]
    assert same(store[2:5], each[2:5]) and same(store[::-2], each[::-2]) and len(store[3:3]) == 0
    for keys in (["a/b", 7, -1], np.array([1, 7, 7]), torch.tensor([1, 7, 7])):
        assert same(store[keys], [each[1], each[7], each[7]])
    assert isinstance(store[:2], list if store.pool == "residues" else torch.Tensor)
    with pytest.raises(KeyError):
        store[["a/b", "nobody"]]
    assert np.array_equal(store.to_numpy(), torch.cat(list(store.batches())).numpy())


def test_what_a_reader_writes_into_a_vector_stays_with_him(store):
    before = store[3].clone()
    store[3].zero_()
    assert torch.equal(store[3], before)


def test_threads_workers_and_pickles_read_the_same(store):
    each = [store[i] for i in range(len(store))]
    assert same([pickle.loads(pickle.dumps(store))[i] for i in range(len(store))], each)
    with ThreadPoolExecutor(4) as pool:
        keys = [*range(len(store)), "a/b"] * 50
        assert same(list(pool.map(store.__getitem__, keys)), [*each, each[1]] * 50)
    loader = torch.utils.data.DataLoader(store, batch_size=None, num_workers=2)
    assert same(list(loader), each)


def test_batches_and_residues_run_in_order_whatever_the_batch(store):
    rows = torch.cat([store[i].reshape(-1, store.dim) for i in range(len(store))])
    for size in (1, 7, 8192):
        batches = list(store.batches(size))
        assert max(map(len, batches)) <= size
        assert torch.equal(torch.cat(batches), rows)
    assert store.rows == len(rows) and same(list(store), [store[i] for i in range(len(store))])


def test_layers_are_kept_apart(store, proteins, fair_esm):
    first = EmbeddingStore(store.path, layer=1)
    exact = expected(fair_esm, proteins[1][4].sequence, store.pool, layer=1)
    torch.testing.assert_close(first[4], exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"a layer of \[1, 3\] required, got 2"):
        EmbeddingStore(store.path, layer=2)


def test_no_store_and_an_unfinished_one_are_refused(store, tmp_path):
    with pytest.raises(InputError):
        EmbeddingStore(tmp_path)
    (tmp_path / "store.json").write_bytes((store.path / "store.json").read_bytes())
    with pytest.raises(InputError, match="finished store required"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shards_are_safetensors_whatever_the_order_of_writing(tmp_path, dtype):
    rows = torch.arange(2 * 5 * 3).reshape(2, 5, 3).float()
    with new_shard(tmp_path / "x.safetensors", [0, 9], rows=5, dim=3, dtype=dtype) as write:
        for start, stop in [(3, 5), (0, 1), (1, 3)]:
            write(start, rows[:, start:stop])
            assert not (tmp_path / "x.safetensors").exists()
    read = load_file(tmp_path / "x.safetensors")
    assert same([read["layer_0"], read["layer_9"]], rows.to(dtype))


@pytest.mark.parametrize(
    ("value", "message"), [(1e6, "use --store-dtype float32"), (float("nan"), "NaN")]
)
def test_values_that_the_dtype_cannot_hold_are_refused_and_leave_nothing(tmp_path, value, message):
    path = tmp_path / "x.safetensors"
    with (
        pytest.raises(InputError, match=message),
        new_shard(path, [0], rows=1, dim=2, dtype=torch.float16) as write,
    ):
        write(0, torch.tensor([[[1.0, value]]]))
    assert not list(tmp_path.iterdir())
