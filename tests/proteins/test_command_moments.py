import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.proteins.command_moments import Config, run
from distil_rank.proteins.store import EmbeddingStore
from tests.core.test_moments import assert_moments


@pytest.mark.parametrize("layer", [None, 1, 3])
def test_moments_of_a_store_are_those_of_its_rows(residues, tmp_path, layer):
    run(Config(residues, tmp_path / "m.safetensors", layer))
    rows = torch.cat(list(EmbeddingStore(residues, layer).batches())).double()
    moments = Moments.load(tmp_path / "m.safetensors")
    assert moments.count == len(rows)
    assert_moments(moments, rows)


def test_moments_of_a_file_are_those_of_its_rows(tmp_path):
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    torch.save(rows, tmp_path / "x.pt")
    run(Config(tmp_path / "x.pt", tmp_path / "m.safetensors"))
    assert_moments(Moments.load(tmp_path / "m.safetensors"), rows)


def test_bad_input_is_refused_and_nothing_written(residues, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"no tensor")
    torch.save(torch.ones(3, 2), tmp_path / "y.pt")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for source, out, layer in [
        (tmp_path / "nothing", tmp_path / "m", None),
        (tmp_path / "folder", tmp_path / "m", None),
        (tmp_path / "x.pt", tmp_path / "m", None),
        (tmp_path / "y.pt", tmp_path / "m", 1),
        (residues, tmp_path / "m", 2),
        (residues, tmp_path / "folder", None),
        (residues, tmp_path / "x.pt" / "m", None),
    ]:
        with pytest.raises(InputError):
            run(Config(source, out, layer))
        assert sorted(tmp_path.rglob("*")) == before
