"""`nested embed`: prefixes are the smaller models' stores; a wrong chain maps nothing."""

from dataclasses import replace

import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.nested import command_embed as embed
from distil_rank.proteins.fasta import write_fasta
from distil_rank.proteins.store import EmbeddingStore
from tests.nested.data import proteins
from tests.proteins import reference


@pytest.fixture
def run(folder, tmp_path) -> embed.Config:
    return embed.Config(folder / "proteins.fasta", folder / "chain", tmp_path / "out")


def test_embed_prefix_is_the_small_models_store(folder, tmp_path, run):
    run = replace(run, pool="residues")
    embed.run(run)
    embed.run(replace(run, out=tmp_path / "short", dim=24))
    embed.run(replace(run, out=tmp_path / "half", store_dtype="float16"))
    whole, short, half = (EmbeddingStore(tmp_path / n) for n in ("out", "short", "half"))
    small = EmbeddingStore(folder / "chain" / "stores" / "a")
    assert (whole.dim, short.dim, whole.rows) == (32, 24, small.rows)
    assert whole.provenance["matryoshka_dims"] == [16, 24, 32]
    assert short.provenance["truncate_dim"] == 24
    for i in range(len(whole)):
        assert torch.equal(whole[i][:, :16], small[i])
        assert torch.equal(whole[i][:, :24], short[i])
        assert torch.equal(half[i][:, :16], small[i].half())
    assert not (tmp_path / "out" / "raw").exists()
    embed.run(run)  # finished: nothing to do


def test_nested_mean_is_the_mean_of_nested_residues(tmp_path, run):
    embed.run(run)
    embed.run(replace(run, out=tmp_path / "residues", pool="residues"))
    embed.run(replace(run, out=tmp_path / "unit", normalize=True, dim=20))
    mean, residues, unit = (EmbeddingStore(tmp_path / n) for n in ("out", "residues", "unit"))
    for i in range(len(mean)):
        torch.testing.assert_close(residues[i].mean(0), mean[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unit[i].norm(), torch.tensor(1.0))
        torch.testing.assert_close(unit[i], mean[i][:20] / mean[i][:20].norm())


def test_bad_embed(folder, tmp_path, run):
    models = tuple(str(folder / f"{n}.pt") for n in "abc")
    for changes, message in [
        ({"dim": 15}, "between 16 and 32"),
        ({"pool": "bos"}, "got bos; embed <cls> with one model"),
        ({"chain": tmp_path}, "of a nested chain required"),
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
