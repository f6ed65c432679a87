import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from distil_rank.proteins.command_embed import Config, run
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


@pytest.fixture(scope="session")
def config(checkpoint, tmp_path_factory) -> Config:
    """Sixty proteins in some ten shards, a few of them longer than the window."""
    fasta = tmp_path_factory.mktemp("fasta") / "proteins.fasta.gz"
    reference.random_fasta(fasta, 60)
    sizes = {"max_length": 100, "shard_residues": 400, "batch_tokens": 300}
    return Config(fasta, str(checkpoint), Path(), long="window", device="cpu", **sizes)


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory) -> Path:
    """The store of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "store"
    run(replace(config, out=out))
    return out


@pytest.fixture(scope="session")
def residues(config, tmp_path_factory) -> Path:
    """A store of the residues of the same proteins, in two layers."""
    out = tmp_path_factory.mktemp("residues") / "store"
    run(replace(config, out=out, pool="residues", layers=(1, -1)))
    return out


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    modules = [f"tests.proteins.{name}" for name in ("test_embed_resumes", "test_pretrain")]
    context.set_forkserver_preload(["torch._dynamo", *modules])  # which optimizers import
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    return context


@pytest.fixture
def untouched_global_state():
    """Nothing in the package draws from the global generator or changes threads or precision."""

    def state():
        precision = torch.get_float32_matmul_precision()
        return torch.get_num_threads(), precision, torch.is_grad_enabled()

    random, before = torch.get_rng_state(), state()
    yield
    assert torch.equal(random, torch.get_rng_state()) and before == state()
