import multiprocessing
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distil_rank.core.devices import process_group
from distil_rank.core.errors import InputError
from distil_rank.core.locks import only_writer
from distil_rank.proteins import command_embed, command_moments
from distil_rank.proteins.batching import windows
from distil_rank.proteins.embedding_files import load_matrix, provenance
from distil_rank.proteins.command_embed import Config, run
from distil_rank.proteins.fasta import Protein, write_fasta
from distil_rank.proteins.pooling import embed
from distil_rank.proteins.store import INDEX, EmbeddingStore, IndexWriter, shard_path
from distil_rank.core.moments import Moments
from tests.conftest import ROOT
from tests.proteins import reference

pytestmark = pytest.mark.usefixtures("untouched_global_state")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def config(checkpoint, tmp_path_factory) -> Config:
    """Sixty proteins in some ten shards, a few of them longer than the window."""
    fasta = tmp_path_factory.mktemp("fasta") / "proteins.fasta.gz"
    reference.random_fasta(fasta, 60)
    return Config(fasta, str(checkpoint), Path(), long="window", max_length=100, shard_residues=400, batch_tokens=300)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """The store of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "store"
    run(replace(config, out=out))
    return out


# what is computed


@pytest.mark.parametrize("pool", ["mean", "bos", "residues"])
def test_long_proteins_are_the_blend_of_their_windows(ours, fair_esm, pool):
    sequence = reference.random_sequence(random.Random(1), 333)
    spans = [(window.start, window.stop) for window in windows(0, 333, 100)]
    blended = reference.blended(fair_esm, sequence, spans, ramp=25)
    ((_, vectors),) = embed(ours, [sequence], pool, max_length=100)
    if pool == "bos":
        heads = torch.stack([reference.hidden(fair_esm, sequence[start:stop], 3)[0] for start, stop in spans])
        shares = torch.stack([window.blend.sum() / 333 for window in windows(0, 333, 100)])
        expected = (shares[:, None] * heads).sum(0, keepdim=True)
    else:
        expected = blended if pool == "residues" else blended.mean(0, keepdim=True)
    torch.testing.assert_close(vectors[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "bos", "residues"])
def test_window_is_full_where_the_protein_fits_and_truncate_is_its_beginning(ours, config, tmp_path, pool):
    long = reference.random_sequence(random.Random(2), 140)
    for name, sequence in [("long", long), ("cut", long[:100])]:
        write_fasta(tmp_path / f"{name}.fasta", [Protein("p", "p", sequence)])

    def store(name, **settings):
        out = tmp_path / "-".join(map(str, (name, *settings.values())))
        run(replace(config, fasta=tmp_path / f"{name}.fasta", out=out, pool=pool, **settings))
        return EmbeddingStore(out)[0]

    full = store("long", long="error", max_length=140)
    assert torch.equal(store("long", long="window", max_length=140), full)
    assert torch.equal(store("long", long="truncate", max_length=100), store("cut", long="error", max_length=100))
    windowed = store("long", long="window", max_length=100)
    assert windowed.shape == full.shape and not torch.equal(windowed, full)


def test_batch_size_and_company_change_nothing(ours):
    draw = random.Random(3)
    proteins = [reference.random_sequence(draw, draw.randint(1, 90)) for _ in range(40)]
    alone = {i: vectors for i, protein in enumerate(proteins) for _, vectors in embed(ours, [protein])}
    for budget in (1, 500, 10**6):
        found = dict(embed(ours, proteins, batch_tokens=budget))
        assert sorted(found) == list(range(40))
        for i, vectors in found.items():
            torch.testing.assert_close(vectors, alone[i], rtol=1e-5, atol=1e-5)


def test_stored_dtype_is_a_rounding_of_float32(config, whole, tmp_path):
    exact = torch.cat(list(EmbeddingStore(whole).batches()))
    for dtype in ("float16", "bfloat16"):
        run(replace(config, out=tmp_path / dtype, store_dtype=dtype))
        stored = torch.cat(list(EmbeddingStore(tmp_path / dtype).batches()))
        assert torch.equal(stored, exact.to(getattr(torch, dtype)))


def test_a_pooled_store_is_the_mean_of_a_store_of_residues(config, whole, tmp_path):
    run(replace(config, out=tmp_path / "r", pool="residues"))
    pooled = EmbeddingStore(whole)
    for i, residues in EmbeddingStore(tmp_path / "r").residues():
        torch.testing.assert_close(residues.mean(0), pooled[i], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Path:
    """Thirty families of three relatives each."""
    draw = random.Random(6)
    path = tmp_path_factory.mktemp("families") / "families.fasta"
    records = []
    for family in range(30):
        parent = "".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=90))
        for member in range(3):
            child = "".join(draw.choice("ACDEFGHIKLMNPQRSTVWY") if draw.random() < 0.1 else aa for aa in parent)
            records.append(Protein(f"f{family}-{member}", f"f{family}-{member}", child))
    draw.shuffle(records)
    write_fasta(path, records)
    return path


def test_split_writes_what_main_py_reads_and_cuts_no_family(config, families, tmp_path, capsys):
    run(replace(config, fasta=families, out=tmp_path / "s", split=0.2, store_dtype="float16"))
    store = EmbeddingStore(tmp_path / "s")
    x, x_val = load_matrix(store.path / "embeddings_train.pt"), load_matrix(store.path / "embeddings_val.pt")
    assert len(x) + len(x_val) == 90 and 15 <= len(x_val) <= 18
    where = {tuple(store[i].tolist()): store.ids[i].partition("-")[0] for i in range(90)}
    families_of = [{where[tuple(row.tolist())] for row in rows} for rows in (x, x_val)]
    assert len(families_of[0]) + len(families_of[1]) == 30 and not families_of[0] & families_of[1]
    known = provenance(store.path / "embeddings_train.pt")
    assert (known["source"], known["model"], known["n_val"]) == ("families.fasta", "tiny", len(x_val))
    assert f"main.py --train {store.path}/embeddings_train.pt" in capsys.readouterr().out


# resuming


def test_provenance_says_how_the_vectors_were_made(config, whole, checkpoint):
    found = EmbeddingStore(whole).provenance
    assert found["model"] == "tiny" and len(found["weights_sha256"]) == 64
    assert (found["pool"], found["dtype"], found["long"], found["max_length"]) == ("mean", "float32", "window", 100)
    assert found["layers"] == [3] and found["proteins"] == 60 and found["longer_proteins"] > 0
    assert str(checkpoint.parent) not in str(found)


def test_a_second_run_writes_nothing(config, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    run(replace(config, out=whole))
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def _damage(folder: Path, what: str) -> None:
    shard, index = shard_path(folder, 2), folder / INDEX
    content = shard.read_bytes()
    if what == "missing shard":
        shard.unlink()
    elif what == "truncated shard":
        shard.write_bytes(content[:-1])
    elif what == "other header":
        shard.write_bytes(content.replace(b"layer_3", b"layer_1"))
    elif what == "truncated index":
        index.write_bytes(index.read_bytes()[:5000])
    else:
        with closing(sqlite3.connect(index)) as database, database:
            database.execute("DELETE FROM protein WHERE position = 7")


@pytest.mark.parametrize(
    "what",
    ["missing shard", "truncated shard", "other header", "truncated index", "shortened index"],
)
def test_a_damaged_store_is_made_whole_again(config, whole, tmp_path, capsys, what):
    shutil.copytree(whole, tmp_path / "store")
    _damage(tmp_path / "store", what)
    kept = shard_path(tmp_path / "store", 1).stat().st_mtime_ns
    run(replace(config, out=tmp_path / "store"))
    assert contents(tmp_path / "store") == contents(whole)
    assert shard_path(tmp_path / "store", 1).stat().st_mtime_ns == kept
    assert ("1 missing or damaged shards" in capsys.readouterr().err) == ("index" not in what)


def test_one_run_at_a_time_writes_in_a_store(config, whole, tmp_path):
    out = tmp_path / "store"
    out.mkdir()
    with only_writer(out), pytest.raises(InputError, match=f"held by process {os.getpid()}"):
        run(replace(config, out=out))
    run(replace(config, out=out))
    assert contents(out) == contents(whole)


def test_success_means_that_every_protein_is_in_the_store(config, tmp_path, monkeypatch):
    monkeypatch.setattr(IndexWriter, "add", lambda *_: None)
    with pytest.raises(InputError, match="all shards and proteins"):
        run(replace(config, out=tmp_path / "store"))


def _killed(config: Config, replaces: int) -> None:
    """In a process of its own: SIGKILL when the `replaces`-th file is about to get its name."""
    real, count = os.replace, 0

    def replace_or_die(*names):
        nonlocal count
        count += 1
        if count == replaces:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*names)

    os.replace = replace_or_die
    run(config)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distil_rank.proteins.command_embed", "tests.proteins.test_command_embed"])
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    return context


@pytest.mark.parametrize("point", ["first", "middle", "last"])
def test_killed_before_a_file_is_complete_then_resumed(config, whole, processes, tmp_path, point):
    shards = EmbeddingStore(whole).provenance["shards"]
    config = replace(config, out=tmp_path / "store")
    nth = {"first": 1, "middle": 1 + shards // 2, "last": shards + 2}[point]  # store.json, shards, index
    process = processes.Process(target=_killed, args=(config, nth))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(".tmp" in path.name for path in config.out.iterdir())
    run(config)
    assert contents(config.out) == contents(whole)


def test_what_a_run_killed_at_its_very_start_left_is_no_obstacle(config, whole, tmp_path):
    for name in (".write-test-123", "store.json.123.tmp", ".lock"):
        (tmp_path / name).write_text("")
    run(replace(config, out=tmp_path))
    assert contents(tmp_path) == contents(whole)


def _kill_at_random_points(config, whole, processes, folder, points):
    """Kill after a random share of the time that a whole run takes, and resume."""
    started = time.perf_counter()
    process = processes.Process(target=run, args=(replace(config, out=folder / "timing"),))
    process.start()
    process.join()
    duration = time.perf_counter() - started
    draw = random.Random(4)
    killed = 0
    for point in range(points):
        out = folder / f"store{point}"
        process = processes.Process(target=run, args=(replace(config, out=out),))
        process.start()
        time.sleep(duration * draw.uniform(0.05, 0.95))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        run(replace(config, out=out))
        assert contents(out) == contents(whole)
    return killed


def test_killed_at_random_points(config, whole, processes, tmp_path):
    _kill_at_random_points(config, whole, processes, tmp_path, points=3)


@pytest.mark.slow
def test_killed_at_twenty_random_points(config, processes, tmp_path):
    reference.random_fasta(tmp_path / "many.fasta", 400, seed=5)
    config = replace(config, fasta=tmp_path / "many.fasta", shard_residues=1500, pool="residues")
    whole = replace(config, out=tmp_path / "whole")
    run(whole)
    assert _kill_at_random_points(config, whole.out, processes, tmp_path, points=20) >= 15


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
    before = contents(whole)
    with pytest.raises(InputError, match=r"the same settings as in .* required"):
        run(replace(config, out=whole, **change))
    assert contents(whole) == before


# the command, one process and two


def command(*arguments, launcher=("-m", "distil_rank")):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def _rank(rank: int, world: int, port: int, jobs) -> None:
    """One rank as torchrun starts it (in a process of its own), on one thread."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with process_group():  # one group for all jobs: a second one on the same port could meet what is left of the first
        for function, config in jobs:
            function(config)


def check_equal_stores_and_moments(folder):
    assert contents(folder / "one") == contents(folder / "two")
    one, two = (Moments.load(folder / f"{name}.safetensors") for name in ("one", "two"))
    rows = torch.cat(list(EmbeddingStore(folder / "one").batches())).double()
    assert one.count == two.count == len(rows) == 60
    torch.testing.assert_close(one.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two.mean, one.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two.covariance, one.covariance, rtol=1e-12, atol=1e-12)


def test_two_ranks_write_the_store_and_the_moments_of_one(config, processes, tmp_path):
    for name, world in [("one", 1), ("two", 2)]:
        store, out = tmp_path / name, tmp_path / f"{name}.safetensors"
        jobs = [(run, replace(config, out=store, layers=(-1, 0))), (command_moments.run, command_moments.Config(store, out))]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [processes.Process(target=_rank, args=(rank, world, port, jobs)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=300)
        assert [rank.exitcode for rank in ranks] == [0] * world
    check_equal_stores_and_moments(tmp_path)


@pytest.mark.slow
def test_torchrun_writes_the_store_and_the_moments_of_one_process(config, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "distil_rank")
    flags = [config.fasta, "--model", config.model, "--long", "window", "--max-length", 100, "--shard-residues", 400]
    for name, launcher in [("one", ("-m", "distil_rank")), ("two", torchrun)]:
        done = command("embed", *flags, "--layers", -1, 0, "--out", tmp_path / name, launcher=launcher)
        assert done.returncode == 0, done.stderr
        done = command("moments", tmp_path / name, "--out", tmp_path / f"{name}.safetensors", launcher=launcher)
        assert done.returncode == 0, done.stderr
    check_equal_stores_and_moments(tmp_path)


def test_bad_input_is_one_line_and_status_2(config, tmp_path):
    done = command("embed", tmp_path / "none.fasta", "--model", config.model, "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("distil-rank embed: error: required a FASTA file") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


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


def test_changes_to_sequences_are_counted_aloud(config, tmp_path, capsys):
    (tmp_path / "odd.fasta").write_text(">a\nmk-v*\n>b\nMJV\n>long\n" + "MKV" * 50 + "\n")
    run(replace(config, fasta=tmp_path / "odd.fasta", out=tmp_path / "out"))
    warnings = capsys.readouterr().err
    for words in ("gaps removed: 1 in 1 protein: a", "J or inner * read as X: 1 in 1 protein: b", "long (150)"):
        assert warnings.count(words) == 1
    store = EmbeddingStore(tmp_path / "out")
    assert [store.describe(i)["length"] for i in range(3)] == [3, 3, 150]


def test_progress_is_silent_in_a_pipe(config, tmp_path, capsys):
    run(replace(config, out=tmp_path / "out"))
    assert "%" not in capsys.readouterr().err and command_embed.__doc__


def _peak(config: Config, queue) -> None:
    run(config)
    status = Path("/proc/self/status").read_text().splitlines()
    queue.put(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads peak memory from /proc")
def test_peak_memory_does_not_grow_with_the_number_of_proteins(config, processes, tmp_path):
    peak = {}
    for count in (200, 2000):
        reference.random_fasta(tmp_path / f"{count}.fasta", count, longest=900)
        small = replace(config, fasta=tmp_path / f"{count}.fasta", out=tmp_path / str(count), shard_residues=4000)
        queue = processes.Queue()
        process = processes.Process(target=_peak, args=(small, queue))
        process.start()
        peak[count] = queue.get(timeout=600)
        process.join()
    assert peak[2000] < 1.05 * peak[200]
