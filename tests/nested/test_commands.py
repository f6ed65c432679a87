"""`nested fit` and `nested embed`, end to end with small random models of the real architecture."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.nested import command_embed as embed
from distil_rank.nested import command_fit as fit
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.rows import StoreRows, joint_moments
from distil_rank.nested.single_pass import SinglePass
from distil_rank.proteins import command_embed as embeddings
from distil_rank.proteins.fasta import AMINO_ACIDS, Protein, write_fasta
from distil_rank.proteins.store import EmbeddingStore
from tests.proteins import reference

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (16, 24, 32)


def proteins(count=40, seed=0):
    draw = generator(seed, "proteins")
    lengths = torch.randint(8, 40, (count,), generator=draw).tolist()
    letters = [torch.randint(20, (n,), generator=draw).tolist() for n in lengths]
    return [
        Protein(f"p{i}", f"p{i}", "".join(AMINO_ACIDS[a] for a in row))
        for i, row in enumerate(letters)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models a.pt, b.pt, c.pt of growing width, proteins.fasta, and a chain over them with its single pass."""
    folder = tmp_path_factory.mktemp("nested")
    for i, (name, width) in enumerate(zip("abc", WIDTHS)):
        reference.save_fair_esm(
            reference.fair_esm_model(2, width, 4, seed=i), folder / f"{name}.pt"
        )
    write_fasta(folder / "proteins.fasta", proteins())
    fit.run(config(folder))
    return folder


def config(folder, **changes):
    models = tuple(str(folder / f"{n}.pt") for n in "abc")
    base = fit.Config(
        folder / "chain", folder / "proteins.fasta", models=models, single_pass=True, held_out=0.2
    )
    return replace(base, **changes)


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
        for kind in ("regression", "reconstruction"):
            measured = record["held_out_r2"][size][kind]
            assert measured["value"] == pytest.approx(
                record["r2"][size]["held_out"][kind], abs=1e-6
            )
            assert measured["low"] <= measured["value"] <= measured["high"] and measured["n"] < 40


def test_embed_prefix_is_the_small_models_store(folder, tmp_path):
    run = embed.Config(
        folder / "proteins.fasta", folder / "chain", tmp_path / "whole", pool="residues"
    )
    embed.run(run)
    embed.run(replace(run, out=tmp_path / "short", dim=24))
    embed.run(replace(run, out=tmp_path / "half", store_dtype="float16"))
    whole, short, half = (EmbeddingStore(tmp_path / n) for n in ("whole", "short", "half"))
    small = EmbeddingStore(folder / "chain" / "stores" / "a")
    assert (whole.dim, short.dim, whole.rows) == (32, 24, small.rows)
    assert (
        whole.provenance["matryoshka_dims"] == [16, 24, 32]
        and short.provenance["truncate_dim"] == 24
    )
    for i in range(len(whole)):
        assert torch.equal(whole[i][:, :16], small[i])
        assert torch.equal(whole[i][:, :24], short[i])
        assert torch.equal(half[i][:, :16], small[i].half())
    assert not (tmp_path / "whole" / "raw").exists()
    embed.run(run)  # finished: nothing to do


def test_nested_mean_is_the_mean_of_nested_residues(folder, tmp_path):
    run = embed.Config(folder / "proteins.fasta", folder / "chain", tmp_path / "mean")
    embed.run(run)
    embed.run(replace(run, out=tmp_path / "residues", pool="residues"))
    embed.run(replace(run, out=tmp_path / "unit", normalize=True, dim=20))
    mean, residues, unit = (EmbeddingStore(tmp_path / n) for n in ("mean", "residues", "unit"))
    for i in range(len(mean)):
        torch.testing.assert_close(residues[i].mean(0), mean[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unit[i].norm(), torch.tensor(1.0))
        torch.testing.assert_close(unit[i], mean[i][:20] / mean[i][:20].norm())


def test_single_pass_is_ridge_of_the_nested_embedding_on_hidden_layers(folder):
    chain, single = NestedChain.load(folder / "chain"), SinglePass.load(folder / "chain")
    assert single.layers == (1, 2)
    stores = {n: StoreRows(folder / "chain" / "stores" / n) for n in "abc"}
    hidden = [StoreRows(folder / "chain" / "stores" / "c", layer).read(0, 40) for layer in (1, 2)]
    z = chain.embed({n: s.read(0, 40) for n, s in stores.items()}).double()
    out = single.embed([h.double() for h in hidden])
    rows = {**stores, "c@1": StoreRows(folder / "chain" / "stores" / "c", 1), "c@2": stores["c"]}
    everything, _ = joint_moments(rows, 0)
    start = 0
    for size, stop in chain.dims.items():
        error, centred = (z - out)[:, start:stop], z[:, start:stop] - z[:, start:stop].mean(0)
        expected = 1 - float(error.square().sum() / centred.square().sum())
        assert single.scores(chain, everything)[size] == pytest.approx(expected, abs=1e-5)
        start = stop
    assert single.record["r2"]["fit"]["c"] > 0 and set(single.record["r2"]["held_out"]) == set(
        "abc"
    )
    # the full rank is ridge itself: normal equations with the penalty found
    full = SinglePass.fit(chain, everything, (1, 2), rank=32)
    h = torch.cat(hidden, 1).double()
    hc, zc = h - h.mean(0), z - z.mean(0)
    weights = torch.linalg.solve(
        hc.T @ hc + len(h) * full.record["penalty"] * torch.eye(64).double(), hc.T @ zc
    )
    torch.testing.assert_close(
        full.embed([x.double() for x in hidden]), hc @ weights + z.mean(0), rtol=1e-4, atol=1e-5
    )


def test_pooled_mode(folder, tmp_path):
    write_fasta(tmp_path / "many.fasta", proteins(120, seed=1))
    fit.run(
        config(
            folder,
            fasta=tmp_path / "many.fasta",
            out=tmp_path / "chain",
            rows="mean",
            single_pass=False,
        )
    )
    chain = NestedChain.load(tmp_path / "chain")
    assert chain.record["rows"]["fit"] + chain.record["rows"]["held_out"] == 120
    assert {m["pool"] for m in chain.record["models"].values()} == {"mean"}


def test_cls_is_mapped_by_a_chain_of_cls_alone(folder, tmp_path):
    write_fasta(tmp_path / "many.fasta", proteins(120, seed=1))
    chain = tmp_path / "chain"
    fit.run(config(folder, fasta=tmp_path / "many.fasta", out=chain, rows="bos", single_pass=False))
    run = embed.Config(folder / "proteins.fasta", chain, tmp_path / "out", pool="bos")
    embed.run(run)
    assert EmbeddingStore(tmp_path / "out").pool == "bos"
    for wrong in (replace(run, chain=folder / "chain"), replace(run, pool="mean")):
        with pytest.raises(InputError, match="<cls> by a chain of <cls>"):
            embed.run(replace(wrong, out=tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()


def test_sampled_proteins(folder, tmp_path):
    for name in ("one", "two"):
        fit.run(config(folder, out=tmp_path / name, max_proteins=25, single_pass=False))
    one, two = (NestedChain.load(tmp_path / n) for n in ("one", "two"))
    assert one.record["data"]["proteins"] == 25
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one.stages, two.stages))


def test_killed_fit_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("distil_rank.nested.rows.BATCH", 50)
    monkeypatch.setattr("distil_rank.nested.rows.SAVE_EVERY", 1)
    run = config(folder, out=tmp_path / "whole")
    fit.run(run)
    reads = 0
    read = StoreRows.read

    def killed(self, start, stop):
        nonlocal reads
        reads += 1
        if reads == 45:
            raise KeyboardInterrupt
        return read(self, start, stop)

    monkeypatch.setattr(StoreRows, "read", killed)
    with pytest.raises(KeyboardInterrupt):
        fit.run(replace(run, out=tmp_path / "killed"))
    assert not (tmp_path / "killed" / "chain.safetensors").exists() and list(
        (tmp_path / "killed").glob("partial*")
    )
    fit.run(replace(run, out=tmp_path / "killed"))
    for name in ("chain", "moments", "held_out", "single_pass"):
        one, two = (load_file(tmp_path / n / f"{name}.safetensors") for n in ("whole", "killed"))
        assert all(torch.equal(one[k], two[k]) for k in one), name


def command(*arguments, launcher):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_ranks_fit_and_embed_as_one(folder, tmp_path):
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "distil_rank",
    )
    models = [folder / f"{n}.pt" for n in "abc"]
    done = command(
        "nested",
        "fit",
        folder / "proteins.fasta",
        "--models",
        *models,
        "--held-out",
        0.2,
        "--max-proteins",
        40,
        "--out",
        tmp_path / "chain",
        launcher=torchrun,
    )
    assert done.returncode == 0, done.stderr
    one, two = (
        Moments.load(folder / "chain" / "moments.safetensors"),
        Moments.load(tmp_path / "chain" / "moments.safetensors"),
    )
    torch.testing.assert_close(two.covariance, one.covariance[:72, :72], rtol=1e-12, atol=1e-12)
    flags = (
        "nested",
        "embed",
        folder / "proteins.fasta",
        "--chain",
        tmp_path / "chain",
        "--dim",
        24,
    )
    for name, launcher in [("one", ("-m", "distil_rank")), ("two", torchrun)]:
        done = command(*flags, "--out", tmp_path / name, launcher=launcher)
        assert done.returncode == 0, done.stderr
    one, two = EmbeddingStore(tmp_path / "one"), EmbeddingStore(tmp_path / "two")
    assert all(torch.equal(one[i], two[i]) for i in range(40))


BAD_FITS = {
    "nothing asked": ({"models": ()}, "one of --family, --models and --stores"),
    "two asked": ({"family": "nano"}, "got family, models"),
    "no fasta": ({"fasta": None}, "a FASTA file required"),
    "unknown family": ({"models": (), "family": "esm9"}, "a family of esm2, nano"),
    "unknown size": ({"models": (), "family": "esm2", "upto": "9T"}, "a size of 8M"),
    "smallest alone": ({"models": (), "family": "esm2", "upto": "8M"}, "at least two sizes"),
    "components": ({"components": "many"}, "mp, held-out or a number"),
    "no held-out": ({"components": "held-out", "held_out": 0.0}, "leave some out"),
    "fraction": ({"held_out": 1.5}, r"in \[0, 1\)"),
    "no proteins": ({"max_proteins": 0}, "--max-proteins must be at least 1"),
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_fit(folder, tmp_path, case):
    changes, message = BAD_FITS[case]
    with pytest.raises(InputError, match=message):
        fit.run(config(folder, out=tmp_path / "chain", **changes))
    assert not (tmp_path / "chain" / "chain.safetensors").exists()


def test_stores_that_do_not_fit_together(folder, tmp_path):
    write_fasta(tmp_path / "other.fasta", proteins(40, seed=5))
    pooled, other = tmp_path / "pooled", tmp_path / "other"
    embeddings.run(embeddings.Config(folder / "proteins.fasta", str(folder / "b.pt"), pooled))
    embeddings.run(
        embeddings.Config(tmp_path / "other.fasta", str(folder / "b.pt"), other, pool="residues")
    )
    a, b = (folder / "chain" / "stores" / n for n in "ab")
    for stores, message in [
        ((a, pooled), "different tokenization, pooling"),
        ((a, other), "different sequences at position 1"),
        ((b, a), "growing width"),
        ((a, a), "got a twice"),
        ((a, tmp_path / "absent"), "JSON record"),
    ]:
        with pytest.raises(InputError, match=message):
            fit.run(fit.Config(out=tmp_path / "chain", stores=stores))
    assert not (tmp_path / "chain").exists()


def test_bad_embed(folder, tmp_path):
    run = embed.Config(folder / "proteins.fasta", folder / "chain", tmp_path / "out")
    models = tuple(str(folder / f"{n}.pt") for n in "abc")
    for changes, message in [
        ({"dim": 15}, "between 16 and 32"),
        ({"chain": tmp_path}, "chain folder required"),
        ({"models": (models[1],), "dim": 16}, "16 features required for a, got 24"),
        ({"models": models[:2]}, "got none for c"),
        ({"models": (*models, models[0])}, "at most one model"),
    ]:
        with pytest.raises(InputError, match=message):
            embed.run(replace(run, **changes))
    reference.save_fair_esm(reference.fair_esm_model(2, 16, 4, seed=9), tmp_path / "a.pt")
    with pytest.raises(InputError, match="weights that the chain was fitted on"):
        embed.run(replace(run, models=(str(tmp_path / "a.pt"), *models[1:])))
    assert not (tmp_path / "out").exists()
    embed.run(run)
    with pytest.raises(InputError, match="the same dim"):
        embed.run(replace(run, dim=24))
    write_fasta(tmp_path / "other.fasta", proteins(40, seed=5))
    with pytest.raises(InputError, match="proteins of the store"):
        embed.run(replace(run, fasta=tmp_path / "other.fasta"))


def test_one_line_on_standard_error(tmp_path):
    done = command(
        "nested",
        "fit",
        "absent.fasta",
        "--family",
        "esm9",
        "--out",
        tmp_path / "c",
        launcher=("-m", "distil_rank"),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "c").exists()
