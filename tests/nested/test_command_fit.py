"""`nested fit`, end to end with small random models of the real architecture."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from distil_rank.__main__ import main
from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.records import ROOT
from distil_rank.nested import command_fit as fit
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.rows import StoreRows, joint_moments
from distil_rank.proteins import command_embed
from distil_rank.proteins.fasta import write_fasta
from distil_rank.proteins.store import EmbeddingStore
from tests.nested.data import fit_config, proteins

ALONE = (sys.executable, "-m", "distil_rank")
PAIR = (sys.executable, *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])


def test_fit_from_models_equals_fit_from_stores_and_from_tensors(folder, tmp_path):
    chain = NestedChain.load(folder / "chain")
    stores = tuple(folder / "chain" / "stores" / n for n in "abc")
    fit.run(fit.Config(out=tmp_path / "again", stores=stores, held_out=0.2))
    again = NestedChain.load(tmp_path / "again")
    direct = NestedChain.fit({n: StoreRows(p) for n, p in zip("abc", stores)}, held_out=0.2)
    for one, two, three in zip(chain.stages, again.stages, direct.stages):
        assert torch.equal(one.directions, three.directions)
        torch.testing.assert_close(one.directions, two.directions)
    assert chain.dims == {"a": 16, "b": 24, "c": 32}
    assert not list((folder / "chain").glob("partial*"))


def test_held_out_scores_through_embed_agree_with_the_moments(folder):
    record = NestedChain.load(folder / "chain").record
    for size in "bc":
        for kind, value in record["r2"][size]["held_out"].items():
            measured = record["held_out_r2"][size][kind]
            assert measured["value"] == pytest.approx(value, abs=1e-6)
            assert measured["low"] <= measured["value"] <= measured["high"] and measured["n"] < 40


def test_sampled_proteins_and_fewer_directions(folder, tmp_path):
    for name in ("one", "two"):
        fit.run(fit_config(folder, out=tmp_path / name, max_proteins=25, directions=(3, 5)))
    one, two = (NestedChain.load(tmp_path / n) for n in ("one", "two"))
    assert one.record["data"]["proteins"] == 25 and one.dims == {"a": 16, "b": 19, "c": 24}
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one.stages, two.stages))


KILLED = """
import os, sys
from distil_rank.nested import rows
from distil_rank.__main__ import main
rows.BATCH, rows.SAVE_EVERY, reads, read = 50, 1, 0, rows.StoreRows.read
def killed(self, start, stop):
    global reads
    reads += 1
    if reads == 30:
        os.kill(os.getpid(), 9)
    return read(self, start, stop)
rows.StoreRows.read = killed
main(sys.argv[1:])
"""


def test_killed_fit_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("distil_rank.nested.rows.BATCH", 50)
    run = fit_config(folder, out=tmp_path / "whole")
    fit.run(run)
    flags = "--models", *run.models, "--held-out", 0.2, "--device", "cpu"
    fit_killed = "nested", "fit", run.fasta, *flags, "--out", tmp_path / "killed"
    done = command(sys.executable, "-c", KILLED, *fit_killed)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed" / "chain.safetensors").exists()
    assert list((tmp_path / "killed").glob("partial*"))
    fit.run(replace(run, out=tmp_path / "killed", device="cpu"))
    for name in ("chain", "moments", "held_out"):
        one, two = (load_file(tmp_path / n / f"{name}.safetensors") for n in ("whole", "killed"))
        assert all(torch.equal(one[k], two[k]) for k in one), name


def command(*line):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    line = list(map(str, line))
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_ranks_fit_and_embed_as_one(folder, tmp_path):
    fasta, models = folder / "proteins.fasta", [folder / f"{n}.pt" for n in "abc"]
    pair = *PAIR, "-m", "distil_rank"
    flags = "--held-out", 0.2, "--max-proteins", 40, "--exact", "--out", tmp_path / "chain"
    done = command(*pair, "nested", "fit", fasta, "--models", *models, *flags)
    assert done.returncode == 0, done.stderr
    stores = {n: StoreRows(folder / "chain" / "stores" / n) for n in "abc"}
    one, _ = joint_moments(stores, 0.2, exact=True)
    two = Moments.load(tmp_path / "chain" / "moments.safetensors")
    torch.testing.assert_close(two.covariance, one.covariance, rtol=1e-12, atol=1e-12)
    flags = "nested", "embed", fasta, "--chain", tmp_path / "chain", "--dim", 24, "--out"
    for name, launcher in [("one", ALONE), ("two", pair)]:
        done = command(*launcher, *flags, tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, two = EmbeddingStore(tmp_path / "one"), EmbeddingStore(tmp_path / "two")
    assert all(torch.equal(one[i], two[i]) for i in range(40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "one of --family, --models and --stores"),
        ({"family": "nano"}, "got family, models"),
        ({"fasta": None}, "a FASTA file required"),
        ({"models": (), "family": "esm9"}, "a family of esm2, nano"),
        ({"models": (), "family": "esm2", "upto": "9T"}, "a size of 8M"),
        ({"models": (), "family": "esm2", "upto": "8M"}, "at least two sizes"),
        ({"components": "many"}, "mp, held-out or a number"),
        ({"components": "held-out", "held_out": 0.0}, "leave some out"),
        ({"held_out": 1.5}, r"in \[0, 1\)"),
        ({"directions": (3,)}, "directions of b, c required, got 1 numbers"),
        ({"max_proteins": 0}, "--max-proteins must be at least 1"),
        ({"upto": "b"}, "--family required for --upto"),
    ],
)
def test_bad_fit(folder, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        fit.run(fit_config(folder, out=tmp_path / "chain", **changes))
    assert not (tmp_path / "chain" / "chain.safetensors").exists()


def test_stores_that_do_not_fit_together(folder, tmp_path):
    write_fasta(tmp_path / "other.fasta", proteins(40, seed=5))
    model, pooled, other = str(folder / "b.pt"), tmp_path / "pooled", tmp_path / "other"
    run = command_embed.Config(folder / "proteins.fasta", model, pooled)
    command_embed.run(run)
    command_embed.run(replace(run, fasta=tmp_path / "other.fasta", out=other, pool="residues"))
    short = replace(run, model=str(folder / "a.pt"), out=tmp_path / "bos", pool="bos")
    command_embed.run(short)
    cut = replace(short, out=tmp_path / "cut", pool="mean", max_length=20, long="truncate")
    command_embed.run(cut)
    a, b = (folder / "chain" / "stores" / n for n in "ab")
    for stores, message in [
        ((a, pooled), "different tokenization, pooling"),
        ((tmp_path / "bos", pooled), "one pool required, got bos of a, mean of b"),
        ((tmp_path / "cut", pooled), "one long required, got truncate of a, error of b"),
        ((a, other), "others from number 1 on"),
        ((b, a), "growing width"),
        ((a, a), "got a twice"),
        ((a, tmp_path / "absent"), "JSON record"),
    ]:
        with pytest.raises(InputError, match=message):
            fit.run(fit.Config(out=tmp_path / "chain", stores=stores))
    with pytest.raises(InputError, match="a FASTA required for --max-proteins"):
        fit.run(fit.Config(out=tmp_path / "chain", stores=(a, b), max_proteins=5))
    assert not (tmp_path / "chain").exists()


def test_one_line_on_standard_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(f"nested fit absent.fasta --family nano --out {tmp_path}/c".split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "absent.fasta" in error
