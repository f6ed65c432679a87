"""Eight-bit factors: small extra loss, an honest split, whole models."""

import pytest
import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.compress import quantise as quantise_module
from distil_rank.core.lowrank import LowRankLinear
from distil_rank.compress.models import compress_model
from distil_rank.compress.quantise import (
    Int8LowRank,
    certify_int8,
    imitated,
    module_bytes,
    quantise,
    quantise_model,
    rounded,
)
from distil_rank.core.lowrank import Drift, spectrum_from_inputs
from distil_rank.core.moments import Moments
from tests.compress.small_models import output, small_model, token_batches


def case(d_in: int = 40, d_out: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    W, c = (torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((d_out, d_in), (d_out,)))
    mix = torch.randn(d_in, d_in, generator=source, dtype=torch.float64) * torch.linspace(2, 0.05, d_in)
    return W, c, torch.randn(400, d_in, generator=source, dtype=torch.float64) @ mix.T + 2


def test_rounding_is_within_half_a_step():
    matrix = torch.randn(7, 30, dtype=torch.float64) * torch.logspace(-3, 3, 7)[:, None]
    matrix[3] = 0
    integers, scale = rounded(matrix)
    assert integers.dtype == torch.int8 and int(integers.abs().max()) == 127
    error = (integers * scale.double()[:, None] - matrix).abs()
    assert bool((error <= 0.5 * scale.double()[:, None] * (1 + 1e-6)).all())


@pytest.mark.parametrize("rank", [1, 8, 20, 40])
def test_error_is_what_the_integers_do_and_splits_in_two(rank):
    W, c, x = case()
    drift = Drift.none(W, c, Moments.of(x))
    student = spectrum_from_inputs(W, Moments.of(x)).student(W, c, rank)
    small = quantise(student, imitated(student, drift))
    found = certify_int8(student, small, drift)
    y = x @ W.T + c
    variance = (y - y.mean(0)).square().sum()
    direct = (small.dequantised()(x) - y).square().sum() / variance
    assert found.fvu == pytest.approx(float(direct.detach()), rel=1e-6)
    assert found.fvu == pytest.approx(found.low_rank + found.quantisation, rel=0.02, abs=1e-9)
    assert found.bytes == rank * (40 + 50 + 4) + 50 * 8 == module_bytes(small)
    assert found.quantisation < 1e-3


def test_passing_errors_on_beats_rounding_to_the_nearest():
    W, c, x = case()
    drift = Drift.none(W, c, Moments.of(x))
    student = spectrum_from_inputs(W, Moments.of(x)).student(W, c, 20)
    naive = Int8LowRank(
        *rounded(student.A.weight.detach()), *rounded(student.B.weight.detach()), student.B.bias.detach()
    )
    refitted = quantise(student, imitated(student, drift))
    assert certify_int8(student, refitted, drift).quantisation < 0.5 * certify_int8(student, naive, drift).quantisation


def test_a_steep_spectrum_is_balanced(monkeypatch):
    W, c, x = case()
    x = x @ torch.diag(torch.logspace(0, -2.5, 40, dtype=torch.float64))
    drift = Drift.none(W, c, Moments.of(x))
    student = spectrum_from_inputs(W, Moments.of(x)).student(W, c, 30)
    errors = []
    for power in (quantise_module.BALANCE, 0.0):
        monkeypatch.setattr(quantise_module, "BALANCE", power)
        errors.append(certify_int8(student, quantise(student, imitated(student, drift)), drift).quantisation)
    assert errors[0] < 0.9 * errors[1]


def test_forward_is_the_dequantised_layer():
    W, c, x = case()
    drift = Drift.none(W, c, Moments.of(x))
    student = spectrum_from_inputs(W, Moments.of(x)).student(W, c, 8)
    small = quantise(student, imitated(student, drift))
    torch.testing.assert_close(small(x), small.dequantised()(x), rtol=1e-12, atol=1e-9)
    assert small(x.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["fair-esm", "GPT2LMHeadModel"])
def test_a_whole_model(kind):
    model = small_model(kind)
    batches = token_batches(model)
    small, report = compress_model(model, batches, ratio=0.5)
    integers, certificates = quantise_model(small, batches)
    assert set(certificates) == {x.name for x in report.layers if x.rank is not None}
    assert module_bytes(integers) < module_bytes(small)
    assert all(isinstance(integers.get_submodule(name), Int8LowRank) for name in certificates)
    assert any(isinstance(part, LowRankLinear) for part in small.modules())  # the float model is left as it was
    assert max(c.quantisation for c in certificates.values()) < 1e-3
    a, b = output(small, batches[0]), output(integers, batches[0])
    assert float((a - b).square().mean() / a.var()) < 2e-3


def test_a_model_without_low_rank_layers_is_refused():
    with pytest.raises(InputError, match="low-rank layers"):
        quantise_model(nn.Sequential(nn.Linear(3, 3)), [torch.randn(4, 3)])
