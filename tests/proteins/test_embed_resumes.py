"""A store is the same whatever happened on the way: kills, damage, several processes."""

import os
import random
import shutil
import signal
import socket
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distil_rank.core.devices import process_group
from distil_rank.core.errors import InputError
from distil_rank.core.locks import only_writer
from distil_rank.core.moments import Moments
from distil_rank.core.records import require_writable
from distil_rank.proteins import command_embed, command_moments
from distil_rank.proteins.command_embed import Config, run
from distil_rank.proteins.store import EmbeddingStore, shard_path
from distil_rank.proteins.store_index import INDEX
from tests.proteins import reference
from tests.proteins.reference import contents

pytestmark = pytest.mark.usefixtures("untouched_global_state")


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
    elif what == "flipped bit":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif what == "other header":
        shard.write_bytes(content.replace(b"layer_3", b"layer_1"))
    elif what == "truncated index":
        index.write_bytes(index.read_bytes()[:5000])
    else:
        with closing(sqlite3.connect(index)) as database, database:
            database.execute("DELETE FROM protein WHERE position = 7")


DAMAGES = ["missing shard", "truncated shard", "flipped bit", "other header"]
DAMAGES += ["truncated index", "shortened index"]


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_store_is_made_whole_again(config, whole, tmp_path, capsys, what):
    shutil.copytree(whole, tmp_path / "store")
    _damage(tmp_path / "store", what)
    kept = shard_path(tmp_path / "store", 1).stat().st_mtime_ns
    run(replace(config, out=tmp_path / "store", verify=what == "flipped bit"))
    assert contents(tmp_path / "store") == contents(whole)
    assert shard_path(tmp_path / "store", 1).stat().st_mtime_ns == kept
    assert ("1 missing or damaged shards" in capsys.readouterr().err) == ("index" not in what)


def test_whether_one_may_write_does_not_depend_on_who_cleans_the_folder(tmp_path, monkeypatch):
    """The holder of a folder removes what killed runs left, and the probes of others with it."""
    write = Path.write_text

    def written_and_cleaned(path, text):
        write(path, text)
        path.unlink()

    monkeypatch.setattr(Path, "write_text", written_and_cleaned)
    assert require_writable(tmp_path) == tmp_path


def test_one_run_at_a_time_writes_in_a_store(config, whole, tmp_path):
    out = tmp_path / "store"
    out.mkdir()
    with only_writer(out), pytest.raises(InputError, match=f"held by process {os.getpid()}"):
        run(replace(config, out=out))
    run(replace(config, out=out))
    assert contents(out) == contents(whole)


def test_success_means_that_every_protein_is_in_the_store(config, tmp_path, monkeypatch):
    monkeypatch.setattr(command_embed, "insert", lambda *_: None)
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


@pytest.mark.parametrize("point", ["first", "middle", "last"])
def test_killed_before_a_file_is_complete_then_resumed(config, whole, processes, tmp_path, point):
    shards = EmbeddingStore(whole).provenance["shards"]
    config = replace(config, out=tmp_path / "store")
    # the files: store.json, shards, index
    nth = {"first": 1, "middle": 1 + shards // 2, "last": shards + 2}[point]
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


def test_killed_at_random_points(config, whole, processes, tmp_path):
    """After a random share of the time; benchmarks/store_races.py does it a hundred times."""
    started = time.perf_counter()
    process = processes.Process(target=run, args=(replace(config, out=tmp_path / "timing"),))
    process.start()
    process.join()
    duration = time.perf_counter() - started
    draw = random.Random(4)
    for point in range(3):
        out = tmp_path / f"store{point}"
        process = processes.Process(target=run, args=(replace(config, out=out),))
        process.start()
        time.sleep(duration * draw.uniform(0.05, 0.95))
        process.kill()
        process.join()
        run(replace(config, out=out))
        assert contents(out) == contents(whole)


def _rank(rank: int, world: int, port: int, jobs) -> None:
    """One rank as torchrun starts it (in a process of its own), on one thread."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # one group for all jobs: a second one on this port could meet what is left of the first
    with process_group("cpu"):
        for function, config in jobs:
            function(config)


def test_two_ranks_write_the_store_and_the_moments_of_one(config, processes, tmp_path):
    for name, world in [("one", 1), ("two", 2)]:
        store, out = tmp_path / name, tmp_path / f"{name}.safetensors"
        jobs = [
            (run, replace(config, out=store, layers=(-1, 0))),
            (command_moments.run, command_moments.Config(store, out)),
        ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            processes.Process(target=_rank, args=(rank, world, port, jobs)) for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=300)
        assert [rank.exitcode for rank in ranks] == [0] * world
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    one, two = (Moments.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    rows = torch.cat(list(EmbeddingStore(tmp_path / "one").batches())).double()
    assert one.count == two.count == len(rows) == 60
    torch.testing.assert_close(one.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two.mean, one.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two.covariance, one.covariance, rtol=1e-12, atol=1e-12)


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
        files = {"fasta": tmp_path / f"{count}.fasta", "out": tmp_path / str(count)}
        small = replace(config, **files, shard_residues=4000)
        queue = processes.Queue()
        process = processes.Process(target=_peak, args=(small, queue))
        process.start()
        peak[count] = queue.get(timeout=600)
        process.join()
    assert peak[2000] < 1.05 * peak[200]
