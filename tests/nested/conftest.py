from pathlib import Path

import pytest

from distil_rank.nested import command_fit
from distil_rank.proteins.fasta import write_fasta
from tests.nested.data import fit_config, proteins
from tests.proteins import reference


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Models a.pt, b.pt, c.pt of growing width, proteins.fasta, and a chain."""
    folder = tmp_path_factory.mktemp("nested")
    for i, (name, width) in enumerate(zip("abc", (16, 24, 32))):
        model = reference.fair_esm_model(2, width, 4, seed=i)
        reference.save_fair_esm(model, folder / f"{name}.pt")
    write_fasta(folder / "proteins.fasta", proteins())
    command_fit.run(fit_config(folder))
    return folder
