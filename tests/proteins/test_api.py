import pytest
import torch

import distil_rank
from distil_rank.core.errors import InputError
from distil_rank.proteins.fasta import Protein, write_fasta
from tests.proteins import reference


def test_vectors_are_those_of_fair_esm_in_order(fair_esm, checkpoint, tmp_path):
    sequences = ["MKTAYIAKQR", "GAVL", "MKTAYIAKQRQISFVKSHFSRQ"]
    options = {"model": str(checkpoint), "device": "cpu"}
    found = distil_rank.embed(sequences, **options)
    expected = torch.stack([reference.mean_pooled(fair_esm, s) for s in sequences])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    write_fasta(tmp_path / "a.fasta", (Protein(s, s, s.lower()) for s in sequences))
    assert torch.equal(distil_rank.embed(tmp_path / "a.fasta", **options), found)
    residues = distil_rank.embed(sequences, pool="residues", layer=1, **options)
    for sequence, vectors in zip(sequences, residues):
        exact = reference.hidden(fair_esm, sequence, 1)[1:-1]
        torch.testing.assert_close(vectors, exact, rtol=1e-5, atol=1e-5)
    assert distil_rank.embed([], **options).shape == (0, 48)


@pytest.mark.parametrize("wrong", [{"proteins": ["MK", ""]}, {"proteins": "MKT"}, {"pool": "max"}])
def test_what_cannot_be_embedded_is_refused(checkpoint, wrong):
    with pytest.raises(InputError, match="required"):
        distil_rank.embed(**{"proteins": ["MK"], "model": str(checkpoint)} | wrong)
