import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.core.moments import Moments, symmetric_product
from tests import reference


def assert_moments(moments: Moments, x: torch.Tensor, tolerance: float = 1e-10) -> None:
    mean, covariance = reference.moments(x)
    torch.testing.assert_close(moments.mean, mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments.covariance, covariance, rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 300), st.integers(0, 99)
)
def test_any_cut_of_the_stream_gives_the_moments_of_the_whole(sizes, dim, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), dim, generator=g, dtype=torch.float64) * 3 + 100
    streamed = Moments.of(iter(x.split(sizes)))
    merged = Moments(dim)
    for part in reversed(x.split(sizes)):
        merged.merge(Moments.of(part))
    assert streamed.count == merged.count == len(x)
    assert_moments(streamed, x)
    assert_moments(merged, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_summed_in_float64(dtype, source):
    x = (torch.randn(5000, 7, generator=source) + 5).to(dtype)
    assert_moments(Moments.of(x), x)


def test_a_mean_much_larger_than_the_spread_costs_no_precision(source):
    x = torch.randn(4000, 5, generator=source, dtype=torch.float64)
    moved = Moments.of((x + 1e7).split(100))
    torch.testing.assert_close(moved.covariance, Moments.of(x).covariance, rtol=1e-7, atol=1e-7)


def test_a_file_brings_back_the_same_moments(tmp_path, source):
    moments = Moments.of(torch.randn(30, 8, generator=source))
    moments.save(tmp_path / "m.safetensors", model="test")
    loaded = Moments.load(tmp_path / "m.safetensors")
    assert loaded.count == moments.count
    assert torch.equal(loaded.mean, moments.mean) and torch.equal(
        loaded.covariance, moments.covariance
    )
    more = torch.randn(5, 8, generator=source)
    assert torch.equal(loaded.update(more).covariance, moments.update(more).covariance)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_rows_of_a_graph_leave_no_graph_behind(source):
    """Outputs of a layer that trains: the stream must not keep every batch alive."""
    layer = torch.nn.Linear(6, 4)
    x = torch.randn(30, 6, generator=source)
    moments = Moments.of(layer(x)).update(layer(x), exact=False)
    assert not moments.mean.requires_grad and not moments.covariance.requires_grad
    assert_moments(Moments.of(layer(x)), layer(x).detach())


def test_a_state_is_a_copy(source):
    x = torch.randn(30, 6, generator=source)
    moments, same = Moments.of(x), Moments.of(x)
    state = moments.state()
    Moments.from_state(state).update(x + 3).merge(moments)
    moments.update(x - 5)
    for key, value in same.state().items():
        assert torch.equal(state[key], value)


def test_a_file_that_is_not_moments_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="required, got"):
        Moments.load(tmp_path / "x.safetensors")


def test_wrong_width_and_non_finite_rows_are_named():
    moments = Moments(3)
    with pytest.raises(ValueError, match=r"\(n, 3\) required, got \(2, 4\)"):
        moments.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="2 of 5 rows"):
        moments.update(
            torch.tensor(
                [[1.0, 2, 3], [float("nan"), 0, 0], [0, 0, 0], [0, float("inf"), 0], [1, 1, 1]]
            )
        )
    assert moments.count == 0
    with pytest.raises(ValueError, match="moments of 3 features required, got 4"):
        moments.merge(Moments(4))
    with pytest.raises(ValueError, match="at least one row"):
        _ = moments.covariance


def test_symmetric_product_is_the_product_and_exactly_symmetric(source):
    a = torch.randn(530, 40, generator=source, dtype=torch.float64)
    product = symmetric_product(a, a.T)
    torch.testing.assert_close(product, a @ a.T)
    assert torch.equal(product, product.T)


MEMORY = """
import torch
from distil_rank import Moments
g = torch.Generator().manual_seed(0)
moments = Moments(256)
for batches in (4, 56):
    for _ in range(batches):
        moments.update(torch.randn(4096, 256, generator=g))
    status = open("/proc/self/status")
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_rows():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many < few + 40_000  # kilobytes; 56 more batches hold 230,000


def test_moments_of_an_affine_image_and_of_a_part():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    matrix, shift = torch.randn(4, 6, generator=draw).double(), torch.arange(4.0).double()
    assert_moments(Moments.of(x).mapped(matrix, shift), x @ matrix.T + shift)
    assert_moments(Moments.of(x).part(slice(1, 4)), x[:, 1:4])
