"""Shared fixtures. Tests need no network; those on real data are skipped where it is absent."""

from pathlib import Path

import pytest
import torch

from benchmarks import DATA


@pytest.fixture
def shared_data() -> Path:
    """Folder of public data kept beside the checkout ($DISTIL_RANK_DATA, or ../shared/data)."""
    if not DATA.is_dir():
        pytest.skip(f"real data is not here ({DATA.name}): set DISTIL_RANK_DATA to its folder")
    return DATA


@pytest.fixture
def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)
