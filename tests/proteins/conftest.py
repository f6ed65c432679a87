from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.proteins import reference

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def fair_esm():
    """A small random model of fair-esm's own class: 3 layers, 48 features, 4 heads."""
    return reference.fair_esm_model(layers=3, width=48, heads=4)


@pytest.fixture(scope="session")
def checkpoint(fair_esm, tmp_path_factory) -> Path:
    """The same model in fair-esm's checkpoint format."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    reference.save_fair_esm(fair_esm, path)
    return path


@pytest.fixture(scope="session")
def ours(checkpoint):
    from distil_rank.proteins.checkpoints import load_model

    return load_model(str(checkpoint), head=True).model


@pytest.fixture
def untouched_global_state():
    """Nothing in the package draws from the global generator or changes threads or precision."""
    before = (
        torch.get_rng_state(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
    )
    yield
    after = (
        torch.get_rng_state(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
    )
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
