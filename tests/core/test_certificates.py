"""compress_linear and its certificate: what it says is what the stored factors do."""

import copy

import pytest
import torch
from torch import nn

from distil_rank import Moments, compress_linear
from distil_rank.core.certificates import certify
from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import optimum
from distil_rank.core.prior import folds_of
from tests.core.rows import KINDS, draw, layer, loss, rows


@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_is_zero_in_float64(kind):
    x, teacher = rows(kind), layer(40)
    y = teacher(x).detach()
    for rank in (1, 9):
        student, certificate = compress_linear(teacher, Moments.of(x), rank=rank)
        fvu = loss(student(x), y) / loss(y.mean(0), y)
        assert certificate.achieved_fvu == pytest.approx(fvu, rel=1e-9, abs=1e-14)
        assert abs(certificate.gap) <= 1e-9 * max(certificate.floor_fvu, 1e-6)
        assert certificate.rank == student.rank == rank and certificate.rows == len(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_student_has_the_teachers_dtype_and_the_certificate_is_of_the_cast_factors(dtype):
    x, teacher = rows(), layer().to(dtype)
    student, certificate = compress_linear(teacher, Moments.of(x.to(dtype)), rank=6)
    assert student.A.weight.dtype == student.B.bias.dtype == dtype
    x, teacher, exact = x.to(dtype).double(), teacher.double(), copy.deepcopy(student).double()
    y = teacher(x).detach()
    fvu = loss(exact(x), y) / loss(y.mean(0), y)
    assert certificate.achieved_fvu == pytest.approx(fvu, rel=1e-9)
    assert certificate.gap >= -1e-12


def test_a_teacher_without_bias_gets_the_mean():
    x, teacher = rows(), layer(6, bias=False)
    student, certificate = compress_linear(teacher, Moments.of(x), rank=2)
    torch.testing.assert_close(student(x).mean(0), teacher(x).mean(0))
    assert abs(certificate.gap) < 1e-12


def test_a_prior_helps_few_rows_and_is_left_out_where_it_does_not():
    """Never more than 1 % above the sample optimum."""
    teacher = layer(40)
    with torch.no_grad():
        teacher.weight *= torch.logspace(0, -1.5, 24)
    held, scales = draw(2000, 24, seed=50), torch.logspace(-1, 0, 24, dtype=torch.float64)
    ratios = {}
    for n in (12, 30, 200):
        for seed in range(5):
            x = draw(n, 24, seed=100 * n + seed)
            for name, prior in (("own", "own"), ("bad", Moments.of(held * scales + 3))):
                pair = [compress_linear(teacher, folds_of(x), 5, prior=p)[0] for p in (None, prior)]
                plain, blended = (loss(s(held), teacher(held)) for s in pair)
                ratios.setdefault((name, n), []).append(blended / plain)
    assert max(max(found) for found in ratios.values()) < 1.01
    assert sum(ratios["own", 12]) / 5 < 0.97
    with pytest.raises(InputError, match="folds required"):
        compress_linear(teacher, Moments.of(held), 5, prior="own")


def test_fvu_chooses_the_smallest_rank_that_reaches_it():
    x, teacher = rows(), layer()
    by_rank = optimum(teacher.weight, teacher.bias, Moments.of(x)).fvu
    for target in (0.5, 0.1, 0.01):
        student, certificate = compress_linear(teacher, Moments.of(x), fvu=target)
        below = float(by_rank[student.rank - 1])
        assert certificate.achieved_fvu <= target + 1e-9 < below + 1e-9


def test_the_held_out_certificate_is_measured_on_held_out_rows():
    x, teacher = rows(n=200), layer()
    train, val = Moments.of(x[:150]), Moments.of(x[150:])
    student, certificate = compress_linear(teacher, train, rank=4, held_out=val)
    y = teacher(x[150:]).detach()
    fvu = loss(student(x[150:]), y) / loss(y.mean(0), y)
    assert certificate.held_out_achieved_fvu == pytest.approx(fvu, rel=1e-9)
    assert certificate.held_out_floor_fvu < certificate.held_out_achieved_fvu
    assert certificate.held_out_rows == 50


@pytest.mark.parametrize(
    "arguments",
    [{"rank": 0}, {"rank": 25}, {"fvu": 1.0}, {"fvu": -0.1}, {}, {"rank": 3, "fvu": 0.1}],
)
def test_impossible_requests_say_what_is_possible(arguments):
    with pytest.raises(ValueError, match=r"must be|required"):
        compress_linear(layer(), Moments.of(rows()), **arguments)


def test_moments_of_another_width_are_refused():
    with pytest.raises(ValueError, match="moments of 30 features required for this layer, got 24"):
        compress_linear(nn.Linear(30, 24), Moments.of(rows()), rank=2)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Conv1D(nn.Module):
    """As GPT-2's: the weight is stored transposed."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(24, 24)), nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return x @ self.weight + self.bias


def changed(how: str) -> nn.Module:
    """A layer that is not what its weight says."""
    teacher = layer()
    if how == "own forward":
        teacher.forward = lambda x: nn.functional.linear(x, teacher.weight).relu()
    elif how == "hook":
        teacher.register_forward_hook(lambda module, x, y: y * (y > 0))
    elif how == "input hook":
        teacher.register_forward_pre_hook(lambda module, x: (x[0] + 1e-6,))
    elif how == "dropout":
        teacher.register_forward_hook(lambda module, x, y: nn.functional.dropout(y, 0.1))
    return teacher


@pytest.mark.parametrize("how", ["own forward", "hook", "input hook", "dropout"])
def test_a_layer_whose_output_is_changed_is_refused(how):
    moments, student = Moments.of(rows()), compress_linear(layer(), Moments.of(rows()), rank=3)[0]
    with pytest.raises(InputError, match="output W x"):
        compress_linear(changed(how), moments, rank=3)
    with pytest.raises(InputError, match="output W x"):
        certify(changed(how), student, moments)


@pytest.mark.parametrize("module", [Scaled(24, 24), Conv1D(), nn.Bilinear(24, 24, 24)])
def test_what_only_looks_like_a_linear_layer_is_refused(module):
    with pytest.raises(InputError, match="own forward required"):
        compress_linear(module, Moments.of(rows().float()), rank=3)


def test_parametrizations_and_harmless_hooks_are_certified_as_what_they_compute():
    x, seen = rows().float(), []
    teacher = nn.utils.parametrizations.spectral_norm(nn.Linear(24, 24)).eval()
    teacher.register_forward_hook(lambda module, x, y: seen.append(1))
    student, certificate = compress_linear(teacher, Moments.of(x), rank=3)
    y = teacher(x).detach()
    fvu = loss(student(x), y) / loss(y.mean(0), y)
    assert certificate.achieved_fvu == pytest.approx(fvu, rel=1e-4) and seen


def test_factors_that_overflow_in_half_precision_are_an_error():
    """Each weight fits into float16; a factor that gathers a row of them does not."""
    teacher = nn.Linear(24, 24)
    with torch.no_grad():
        teacher.weight.fill_(40_000.0)
    moments = Moments.of(rows().float() * 1e-4)
    _, certificate = compress_linear(teacher, moments, rank=1)
    assert certificate.achieved_fvu < 1e-6
    best = optimum(teacher.weight, teacher.bias, moments)
    for attempt in (
        lambda: compress_linear(teacher.half(), moments, rank=1),
        lambda: best.student(1, torch.float16),
        lambda: certify(teacher, best.student(1).half(), moments),
    ):
        with pytest.raises(InputError, match=r"overflow in A\.weight"):
            attempt()


def test_the_student_has_the_teachers_mode_and_is_frozen_where_it_is():
    moments = Moments.of(rows())
    student, _ = compress_linear(layer(), moments, rank=3)
    assert student.training and all(p.requires_grad for p in student.parameters())
    teacher = layer(bias=False).eval().requires_grad_(False)
    student, _ = compress_linear(teacher, moments, rank=3)
    modes = {part.training for part in student.modules()}
    assert modes == {False} and not any(p.requires_grad for p in student.parameters())
