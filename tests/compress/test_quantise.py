"""Eight-bit factors: small extra loss and an honest split."""

import pytest
import torch
from torch import Tensor

from distil_rank.compress import quantise as quantise_module
from distil_rank.compress.quantise import (
    GROUP,
    QuantLinear,
    certify_int8,
    dequantised,
    in_place,
    module_bytes,
    on_integers,
    quantise,
    rounded,
)
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import Joint, optimum
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator


def case(d_in: int = 40, d_out: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    W, c = (
        torch.randn(*shape, generator=source, dtype=torch.float64)
        for shape in ((d_out, d_in), (d_out,))
    )
    mix = torch.randn(d_in, d_in, generator=source, dtype=torch.float64) * torch.linspace(
        2, 0.05, d_in
    )
    return W, c, torch.randn(400, d_in, generator=source, dtype=torch.float64) @ mix.T + 2


def student_of(x: Tensor, W: Tensor, c: Tensor, rank: int) -> tuple[LowRankLinear, LowRankLinear]:
    """The student of a layer, and its version in eight bits."""
    moments = Moments.of(x)
    student = optimum(W, c, moments).student(rank)
    return student, quantise(student, moments.mean, moments.covariance)


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
    student, small = student_of(x, W, c, rank)
    found = certify_int8(student, small, Joint.of_layer(W, c, Moments.of(x)))
    y = x @ W.T + c
    variance = (y - y.mean(0)).square().sum()
    torch.testing.assert_close(small(x), dequantised(small)(x), rtol=1e-12, atol=1e-9)
    direct = (small(x) - y).square().sum() / variance
    assert found.fvu == pytest.approx(float(direct.detach()), rel=1e-6)
    assert found.fvu == pytest.approx(found.low_rank + found.quantisation, rel=0.02, abs=1e-9)
    assert found.bytes == rank * (40 + 50 + 4) + 50 * 8 == module_bytes(small)
    assert found.quantisation < 1e-3


def test_passing_errors_on_beats_rounding_to_the_nearest():
    W, c, x = case()
    joint = Joint.of_layer(W, c, Moments.of(x))
    student, refitted = student_of(x, W, c, 20)
    naive = in_place(*(QuantLinear.of(p.weight, p.bias) for p in (student.A, student.B)))
    assert (
        certify_int8(student, refitted, joint).quantisation
        < 0.5 * certify_int8(student, naive, joint).quantisation
    )


def test_a_steep_spectrum_is_balanced(monkeypatch):
    W, c, x = case()
    x = x @ torch.diag(torch.logspace(0, -2.5, 40, dtype=torch.float64))
    joint = Joint.of_layer(W, c, Moments.of(x))
    errors = []
    for power in (quantise_module.BALANCE, 0.0):
        monkeypatch.setattr(quantise_module, "BALANCE", power)
        errors.append(certify_int8(*student_of(x, W, c, 30), joint).quantisation)
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("d_in", [40, 65, 130])
def test_layers_in_few_bits_are_small_and_match_their_inputs(bits, d_in):
    W, c, x = case(d_in)
    second = x.T @ x / len(x)
    layer = QuantLinear.of(W, c.float(), second, bits)
    near = rounded(W, None, bits, None if bits == 8 else GROUP)
    scale = near[1].double() if bits == 8 else near[1].double().repeat_interleave(GROUP, 1)
    nearest = near[0] * (scale[:, None] if bits == 8 else scale[:, :d_in])
    lost, naive = (
        float(((V - W) @ second * (V - W)).sum()) for V in (layer.weight.double(), nearest)
    )
    assert lost < 0.85 * naive
    assert layer.weight.shape == W.shape
    torch.testing.assert_close(layer(x), x @ layer.numbers(torch.float64).T + c, atol=1e-5, rtol=0)
    columns, scales = (d_in, 4) if bits == 8 else ((d_in + 1) // 2, 2 * ((d_in + 63) // 64))
    assert module_bytes(layer) == 50 * (columns + scales + 4)
    empty = QuantLinear.empty(d_in, 50, bits, True)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.weight, layer.weight)


def test_eight_bits_multiply_eight_bits_on_the_integer_kernels():
    """As a float64 loop with each row of the input rounded to 127 steps, and within its bound."""
    W, c, x = case(40)
    layer = QuantLinear.of(W, c.float(), x.T @ x / len(x), 8)
    on_integers(layer)
    rows = x.float().reshape(-1, 2, 40)
    found = layer(rows)
    step = rows.abs().amax(-1, keepdim=True) / 127
    rounded_rows = (rows / step).round().double() * step.double()
    expected = rounded_rows @ layer.numbers(torch.float64).T + c
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    layer.integer = False
    exact = layer(rows)
    bound = step / 2 * layer.weight.abs().sum(1)
    assert bool(((found - exact).abs() <= bound + 1e-4).all())
    layer.integer = True
    assert torch.equal(layer(rows[3, 1]), found[3, 1])  # a row does not see the rest of its batch
    assert layer(rows[:0]).shape == (0, 2, 50) and torch.equal(
        layer(0 * rows[0]), c.float().expand(2, 50)
    )
    spoiled = rows[0].clone()
    spoiled[1, 3] = torch.nan
    assert layer(spoiled).isfinite().all(1).tolist() == [True, False]
    wanted = rows[0].clone().requires_grad_()
    layer(wanted).sum().backward()
    torch.testing.assert_close(wanted.grad[0], layer.weight.sum(0))


@pytest.mark.parametrize("d_in", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("d_out", [1, 2, 8, 33])
def test_integer_products_are_exact_in_every_shape(d_in, d_out):
    """torch's own are not for one input feature."""
    draw = generator(d_in, "integers")
    W = torch.randint(-127, 128, (d_out, d_in), generator=draw).double()
    W[:, 0] = 127  # scale 1: the weights are their integers
    layer = on_integers(QuantLinear(W.to(torch.int8), torch.ones(d_out), None, d_in))
    for n in (1, 2, 15):
        x = torch.randint(-127, 128, (n, d_in), generator=draw).float()
        x[:, -1] = 127
        assert torch.equal(layer(x).double(), x.double() @ W.T)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e7])
def test_four_bits_hold_weights_of_any_size(size):
    W, _, x = case(65)
    W[3] = 0
    scaled = W.clone()
    scaled[:20] *= size
    layers = [QuantLinear.of(V.float(), None, x.T @ x / len(x), 4) for V in (W, scaled)]
    plain, other = (layer.weight.double() for layer in layers)
    torch.testing.assert_close(other[:20] / size, plain[:20], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(other[20:], plain[20:], rtol=2e-3, atol=0)
    assert (layers[1].scale.dtype == torch.float16) == (size == 1)
