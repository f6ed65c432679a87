import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distil_rank.__main__ import main
from distil_rank.core.devices import Group
from distil_rank.core.errors import InputError
from distil_rank.proteins import command_embed
from distil_rank.proteins.batching import windows
from distil_rank.proteins.command_embed import run
from distil_rank.proteins.embedding_files import load_matrix, provenance
from distil_rank.proteins.fasta import AMINO_ACIDS, Protein, write_fasta
from distil_rank.proteins.pooling import embed
from distil_rank.proteins.store import EmbeddingStore
from tests.proteins import reference

pytestmark = pytest.mark.usefixtures("untouched_global_state")


# what is computed


@pytest.mark.parametrize("pool", ["mean", "bos", "residues"])
def test_long_proteins_are_the_blend_of_their_windows(ours, fair_esm, pool):
    sequence = reference.random_sequence(random.Random(1), 333)
    spans = [(window.start, window.stop) for window in windows(0, 333, 100)]
    blended = reference.blended(fair_esm, sequence, spans, ramp=25)
    ((_, vectors),) = embed(ours, [sequence], pool, max_length=100)
    if pool == "bos":
        parts = [sequence[start:stop] for start, stop in spans]
        heads = torch.stack([reference.hidden(fair_esm, part, 3)[0] for part in parts])
        shares = torch.stack([window.blend.sum() / 333 for window in windows(0, 333, 100)])
        expected = (shares[:, None] * heads).sum(0, keepdim=True)
    else:
        expected = blended if pool == "residues" else blended.mean(0, keepdim=True)
    torch.testing.assert_close(vectors[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "bos", "residues"])
def test_window_is_full_where_the_protein_fits_and_truncate_is_its_beginning(
    ours, config, tmp_path, pool
):
    long = reference.random_sequence(random.Random(2), 140)
    for name, sequence in [("long", long), ("cut", long[:100])]:
        write_fasta(tmp_path / f"{name}.fasta", [Protein("p", "p", sequence)])

    def store(name, **settings):
        out = tmp_path / "-".join(map(str, (name, *settings.values())))
        run(replace(config, fasta=tmp_path / f"{name}.fasta", out=out, pool=pool, **settings))
        return EmbeddingStore(out)[0]

    full = store("long", long="error", max_length=140)
    assert torch.equal(store("long", long="window", max_length=140), full)
    assert torch.equal(
        store("long", long="truncate", max_length=100), store("cut", long="error", max_length=100)
    )
    windowed = store("long", long="window", max_length=100)
    assert windowed.shape == full.shape and not torch.equal(windowed, full)


def test_batch_size_and_company_change_nothing(ours):
    draw = random.Random(3)
    proteins = [reference.random_sequence(draw, draw.randint(1, 90)) for _ in range(15)]
    alone = {
        i: vectors for i, protein in enumerate(proteins) for _, vectors in embed(ours, [protein])
    }
    for budget in (1, 500, 10**6):
        found = dict(embed(ours, proteins, batch_tokens=budget))
        assert sorted(found) == list(range(15))
        for i, vectors in found.items():
            torch.testing.assert_close(vectors, alone[i], rtol=1e-5, atol=1e-5)


def test_stored_dtype_is_a_rounding_of_float32(config, whole, tmp_path):
    exact = torch.cat(list(EmbeddingStore(whole).batches()))
    for dtype in ("float16", "bfloat16"):
        run(replace(config, out=tmp_path / dtype, store_dtype=dtype))
        stored = torch.cat(list(EmbeddingStore(tmp_path / dtype).batches()))
        assert torch.equal(stored, exact.to(getattr(torch, dtype)))


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Path:
    """Thirty families of three relatives each."""
    draw = random.Random(6)
    path = tmp_path_factory.mktemp("families") / "families.fasta"
    records = []
    for family in range(30):
        parent = draw.choices(AMINO_ACIDS, k=90)
        for name in (f"f{family}-{member}" for member in range(3)):
            child = [draw.choice(AMINO_ACIDS) if draw.random() < 0.1 else aa for aa in parent]
            records.append(Protein(name, name, "".join(child)))
    draw.shuffle(records)
    write_fasta(path, records)
    return path


def test_split_writes_what_main_py_reads_and_cuts_no_family(config, families, tmp_path, capsys):
    run(replace(config, fasta=families, out=tmp_path / "s", split=0.2, store_dtype="float16"))
    store = EmbeddingStore(tmp_path / "s")
    x, x_val = (load_matrix(store.path / f"embeddings_{part}.pt") for part in ("train", "val"))
    assert len(x) + len(x_val) == 90 and 15 <= len(x_val) <= 18
    where = {tuple(store[i].tolist()): store.ids[i].partition("-")[0] for i in range(90)}
    families_of = [{where[tuple(row.tolist())] for row in rows} for rows in (x, x_val)]
    assert len(families_of[0]) + len(families_of[1]) == 30 and not families_of[0] & families_of[1]
    for name, rows in (("train", x), ("val", x_val)):
        ids = (store.path / f"embeddings_{name}.txt").read_text().split()
        assert torch.equal(torch.stack([store[id] for id in ids]).float(), rows)
    known = provenance(store.path / "embeddings_train.pt")
    assert (known["source"], known["n_val"]) == ("families.fasta", len(x_val))
    assert (known["model"], known["split"]["method"]) == ("tiny", "pyswrd")
    assert f"main.py --train {store.path}/embeddings_train.pt" in capsys.readouterr().out
    assert b"embeddings_train" not in (store.path / "embeddings_train.pt").read_bytes()


# resuming


def test_provenance_says_how_the_vectors_were_made(config, whole, checkpoint):
    found = EmbeddingStore(whole).provenance
    assert found["model"] == "tiny" and len(found["weights_sha256"]) == 64
    settings = [found[name] for name in ("pool", "dtype", "long", "max_length")]
    assert settings == ["mean", "float32", "window", 100]
    assert found["layers"] == [3] and found["proteins"] == 60 and found["longer_proteins"] > 0
    assert str(checkpoint.parent) not in str(found)


@pytest.mark.parametrize(
    "change",
    [
        {"store_dtype": "float16"},
        {"dtype": "bfloat16"},
        {"pool": "bos"},
        {"layers": (1,)},
        {"long": "truncate"},
        {"max_length": 90},
        {"shard_residues": 500},
        {"model": "other"},
        {"fasta": "other"},
    ],
    ids=str,
)
def test_another_configuration_in_the_same_store_is_refused(config, whole, tmp_path, change):
    if "model" in change:
        reference.save_fair_esm(reference.fair_esm_model(3, 48, 4, seed=9), tmp_path / "tiny.pt")
        change = {"model": str(tmp_path / "tiny.pt")}
    if "fasta" in change:
        reference.random_fasta(tmp_path / "other.fasta", 60, seed=8)
        change = {"fasta": tmp_path / "other.fasta"}
    before = reference.contents(whole)
    with pytest.raises(InputError, match=r"the same settings as in .* required"):
        run(replace(config, out=whole, **change))
    assert reference.contents(whole) == before


# the command


def test_bad_input_is_one_line_and_status_2(config, tmp_path, capsys):
    fasta, out = str(tmp_path / "none.fasta"), str(tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        main(["embed", fasta, "--model", config.model, "--out", out])
    printed, said = capsys.readouterr()
    assert printed == "" and said.startswith("distil-rank embed: error: required a FASTA file")
    assert said.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_bad_settings_are_refused_before_anything_is_written(config, tmp_path):
    fasta = {
        "digits": ">ok\nMKV\n>bad one\nMK7V\n",
        "empty": "",
        "nothing": ">ok\nMKV\n>gone\n\n",
        "long": ">ok\nMKV\n>titin\n" + "MKV" * 50 + "\n",
    }
    for name, text in fasta.items():
        (tmp_path / f"{name}.fasta").write_text(text)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    for change, message in [
        ({"fasta": tmp_path / "digits.fasta"}, "bad"),
        ({"fasta": tmp_path / "empty.fasta"}, "at least one protein"),
        ({"fasta": tmp_path / "nothing.fasta"}, "gone"),
        (
            {"fasta": tmp_path / "long.fasta", "long": "error"},
            r"titin \(150\); choose --long truncate or --long window",
        ),
        ({"model": "esm3"}, "a model name .* required"),
        ({"layers": (4,)}, "layers between -4 and 3"),
        ({"layers": (3, -1)}, "distinct layers"),
        ({"layers": ()}, "distinct layers"),
        ({"max_length": 2}, "--max-length must be at least 8"),
        ({"batch_tokens": 0}, "--batch-tokens must be at least 1"),
        ({"split": 1.0}, "split between 0 and 1"),
        ({"split": 0.2, "pool": "residues"}, "one vector per protein"),
        ({"split": 0.2, "layers": (1, -1)}, "from one layer"),
        ({"split": 0.2, "fasta": tmp_path / "long.fasta"}, "a protein in every part"),
        ({"out": tmp_path / "file"}, "file"),
        ({"out": tmp_path / "full"}, "other files"),
        ({"out": Path("/proc/store")}, "writable"),
    ]:
        with pytest.raises(InputError, match=message):
            run(replace(config, **{"out": out} | change))
        assert sorted(tmp_path.rglob("*")) == before


def test_no_rank_writes_before_all_have_looked_at_the_folder(config, tmp_path, monkeypatch):
    """One that looked later would find the store that another has begun, and refuse it."""
    done = []

    class Noted(Group):
        def barrier(self):
            done.append("barrier")

    monkeypatch.setattr(command_embed, "process_group", lambda device: nullcontext(Noted()))
    for name in ("_check_folder", "require_writable"):
        step = getattr(command_embed, name)
        noted = lambda *given, name=name, step=step: done.append(name) or step(*given)  # noqa: E731
        monkeypatch.setattr(command_embed, name, noted)
    run(replace(config, out=tmp_path / "store"))
    looked = done.index("_check_folder")
    assert done[looked : looked + 3] == ["_check_folder", "barrier", "require_writable"]


def test_changes_to_sequences_are_counted_aloud(config, tmp_path, capsys):
    (tmp_path / "odd.fasta").write_text(">a\nmk-v*\n>b\nMJV\n>long\n" + "MKV" * 50 + "\n")
    run(replace(config, fasta=tmp_path / "odd.fasta", out=tmp_path / "out"))
    warnings = capsys.readouterr().err
    for words in (
        "gaps removed: 1 in 1 protein: a",
        "J or inner * read as X: 1 in 1 protein: b",
        "long (150)",
    ):
        assert warnings.count(words) == 1
    assert EmbeddingStore(tmp_path / "out").column("length") == [3, 3, 150]
