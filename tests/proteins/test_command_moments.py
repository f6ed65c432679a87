import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.proteins import command_embed
from distil_rank.proteins.command_moments import Config, run
from distil_rank.proteins.store import EmbeddingStore
from tests.proteins import reference


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moments")
    reference.random_fasta(folder / "p.fasta", 30)
    options = {"pool": "residues", "layers": (1, -1), "device": "cpu"}
    fasta, out = folder / "p.fasta", folder / "store"
    command_embed.run(command_embed.Config(fasta, str(checkpoint), out, **options))
    return folder / "store"


@pytest.mark.parametrize("layer", [None, 1, 3])
def test_moments_of_a_store_are_those_of_its_rows(store, tmp_path, layer):
    run(Config(store, tmp_path / "m.safetensors", layer))
    rows = torch.cat(list(EmbeddingStore(store, layer).batches())).double()
    moments = Moments.load(tmp_path / "m.safetensors")
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        moments.covariance, torch.cov(rows.T, correction=0), rtol=1e-10, atol=1e-12
    )


def test_moments_of_a_file_are_those_of_its_rows(tmp_path):
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    torch.save(rows, tmp_path / "x.pt")
    run(Config(tmp_path / "x.pt", tmp_path / "m.safetensors"))
    moments = Moments.load(tmp_path / "m.safetensors")
    torch.testing.assert_close(moments.mean, rows.double().mean(0), rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused_and_nothing_written(store, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"no tensor")
    torch.save(torch.ones(3, 2), tmp_path / "y.pt")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for source, out, layer in [
        (tmp_path / "nothing", tmp_path / "m", None),
        (tmp_path / "folder", tmp_path / "m", None),
        (tmp_path / "x.pt", tmp_path / "m", None),
        (tmp_path / "y.pt", tmp_path / "m", 1),
        (store, tmp_path / "m", 2),
        (store, tmp_path / "folder", None),
        (store, tmp_path / "x.pt" / "m", None),
    ]:
        with pytest.raises(InputError):
            run(Config(source, out, layer))
        assert sorted(tmp_path.rglob("*")) == before
