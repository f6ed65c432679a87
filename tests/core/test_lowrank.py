import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distil_rank import LowRankLinear, Moments, compress_linear, truncated_svd
from distil_rank.core.lowrank import certify, leading_eigenpairs, optimum, refit_bias, smallest_rank, tail_fractions
from tests import reference


def inputs(kind: str, n: int = 90, d: int = 24) -> torch.Tensor:
    """Rows (n, d) in float64 with the difficulty that the name says."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64) + 4
    if kind == "n < d":
        return x[: d // 2]
    if kind == "n = d":
        return x[:d]
    if kind == "one null direction":
        return x - x.mean(1, keepdim=True)  # as after LayerNorm
    if kind == "duplicated rows":
        return x[: d // 3].repeat(5, 1)
    if kind == "constant features":
        x[:, ::3] = 7.0
    if kind == "features scaled by 1e4":
        x[:, ::4] *= 1e4
    return x


KINDS = [
    "plain",
    "n < d",
    "n = d",
    "one null direction",
    "duplicated rows",
    "constant features",
    "features scaled by 1e4",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 24), (10, 24), (40, 24)])
def test_the_optimum_attains_the_floor_exactly(kind, shape):
    x = inputs(kind)
    teacher = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    y = teacher(x).detach()
    eigenvalues = torch.linalg.svdvals(y - y.mean(0)).square() / len(x)
    variance = float((y - y.mean(0)).square().sum(1).mean())
    for rank in (1, 4, 9):
        student, certificate = compress_linear(teacher, Moments.of(x), rank=rank)
        achieved = float((student(x).detach() - y).square().sum(1).mean())
        floor = float(eigenvalues[rank:].sum())
        assert abs(achieved - floor) <= 1e-9 * max(floor, 1e-6 * variance)
        assert certificate.floor_fvu == pytest.approx(floor / variance, rel=1e-9, abs=1e-14)
        assert abs(certificate.gap) <= 1e-9 * max(certificate.floor_fvu, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_regression_by_pseudo_inverse(kind):
    x, rank = inputs(kind), 5
    teacher = nn.Linear(24, 12, dtype=torch.float64)
    student, _ = compress_linear(teacher, Moments.of(x), rank=rank)
    slow = reference.best_low_rank_by_pinv(teacher.weight.detach(), x, rank)
    centred = x - x.mean(0)
    expected, found = centred @ slow.T, centred @ (student.B.weight @ student.A.weight).T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(0, 9999))
def test_no_rank_r_student_is_below_the_floor(rank, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 9, generator=g, dtype=torch.float64) + 1
    teacher = nn.Linear(9, 11, dtype=torch.float64)
    best, certificate = compress_linear(teacher, Moments.of(x), rank=rank)
    noise = [0.01 * torch.randn(p.shape, generator=g, dtype=torch.float64) for p in best.parameters()]
    other = LowRankLinear(
        *(p + e for p, e in zip((best.A.weight, best.B.weight, best.B.bias), (noise[0], noise[1], noise[2])))
    )
    assert certify(teacher, other, Moments.of(x)).achieved_fvu >= certificate.floor_fvu * (1 - 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_student_has_the_teachers_dtype_and_the_certificate_is_of_the_cast_factors(dtype):
    x = inputs("plain")
    teacher = nn.Linear(24, 24).to(dtype)
    student, certificate = compress_linear(teacher, Moments.of(x.to(dtype)), rank=6)
    assert student.A.weight.dtype == student.B.bias.dtype == dtype
    W, c, A, B, b = (
        t.detach().double() for t in (teacher.weight, teacher.bias, student.A.weight, student.B.weight, student.B.bias)
    )
    rows = x.to(dtype).double()
    y = rows @ W.T + c
    variance = (y - y.mean(0)).square().sum(1).mean()
    assert certificate.achieved_fvu == pytest.approx(reference.mse(W, c, A, B, b, rows) / float(variance), rel=1e-9)
    assert certificate.gap >= -1e-12


def test_a_teacher_without_bias_gets_the_mean():
    x = inputs("plain")
    teacher = nn.Linear(24, 6, bias=False, dtype=torch.float64)
    student, certificate = compress_linear(teacher, Moments.of(x), rank=2)
    torch.testing.assert_close(student(x).mean(0), teacher(x).mean(0))
    assert abs(certificate.gap) < 1e-12


def test_full_rank_is_the_teacher():
    x = inputs("plain")
    teacher = nn.Linear(24, 24, dtype=torch.float64)
    student, certificate = compress_linear(teacher, Moments.of(x), rank=24)
    torch.testing.assert_close(student(x), teacher(x))
    assert certificate.floor_fvu == 0 and certificate.achieved_fvu < 1e-20


def test_merged_shards_and_a_stream_give_the_same_student():
    x = inputs("plain")
    teacher = nn.Linear(24, 24, dtype=torch.float64)
    whole, _ = compress_linear(teacher, Moments.of(x), rank=5)
    parts, _ = compress_linear(teacher, Moments.of(x[:31]).merge(Moments.of(x[31:].split(7))), rank=5)
    torch.testing.assert_close(parts(x), whole(x), rtol=1e-9, atol=1e-9)


def test_fvu_chooses_the_smallest_rank_that_reaches_it():
    x = inputs("plain")
    teacher = nn.Linear(24, 24, dtype=torch.float64)
    for target in (0.5, 0.1, 0.01):
        student, certificate = compress_linear(teacher, Moments.of(x), fvu=target)
        below = optimum(teacher.weight, teacher.bias, Moments.of(x)).fvu[student.rank - 1]
        assert certificate.achieved_fvu <= target + 1e-9 < float(below) + 1e-9


def test_limited_and_full_eigendecomposition_agree():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(40, 40, generator=g, dtype=torch.float64)
    symmetric = root @ root.T
    few, vectors = leading_eigenpairs(symmetric, 7)
    many, _ = leading_eigenpairs(symmetric, 40)
    torch.testing.assert_close(few, many[:7])
    torch.testing.assert_close(symmetric @ vectors, vectors * few)
    torch.testing.assert_close(
        tail_fractions(few, float(symmetric.trace())), tail_fractions(many)[:8], rtol=1e-10, atol=1e-12
    )


def test_held_out_certificate_is_measured_on_held_out_rows():
    x = inputs("plain", n=200)
    train, val = x[:150], x[150:]
    teacher = nn.Linear(24, 24, dtype=torch.float64)
    student, certificate = compress_linear(teacher, Moments.of(train), rank=4, held_out=Moments.of(val))
    y = teacher(val).detach()
    variance = (y - y.mean(0)).square().sum()
    assert certificate.held_out_achieved_fvu == pytest.approx(
        float((student(val).detach() - y).square().sum() / variance), rel=1e-9
    )
    assert certificate.held_out_floor_fvu < certificate.held_out_achieved_fvu
    assert certificate.held_out_rows == 50


def test_error_of_the_truncated_svd_is_the_tail_of_the_spectrum(source):
    weight = torch.randn(12, 20, generator=source, dtype=torch.float64)
    for rank in (1, 5, 12):
        A, B = truncated_svd(weight, rank)
        tail = torch.linalg.svdvals(weight)[rank:].square().sum()
        torch.testing.assert_close((weight - B @ A).square().sum(), tail)
        torch.testing.assert_close(A @ A.T, B.T @ B)


def test_refitted_bias_removes_the_mean_error_and_never_hurts(source):
    x = inputs("plain")
    weight, bias = (
        torch.randn(24, 24, generator=source, dtype=torch.float64),
        torch.randn(24, generator=source, dtype=torch.float64),
    )
    A, B = truncated_svd(weight, 3)
    refitted = refit_bias(weight, bias, A, B, x.mean(0))
    assert reference.mse(weight, bias, A, B, refitted, x) < reference.mse(weight, bias, A, B, bias, x)
    torch.testing.assert_close((x @ A.T @ B.T + refitted).mean(0), (x @ weight.T + bias).mean(0))


def test_factors_are_ordered():
    x = inputs("plain")
    teacher = nn.Linear(24, 24, dtype=torch.float64)
    large, _ = compress_linear(teacher, Moments.of(x), rank=9)
    small, _ = compress_linear(teacher, Moments.of(x), rank=4)
    cut = large.truncate(4)
    product, expected = cut.B.weight @ cut.A.weight, small.B.weight @ small.A.weight
    torch.testing.assert_close(product, expected)


def test_a_saved_student_is_the_same_student(tmp_path):
    teacher = nn.Linear(24, 12)
    student, certificate = compress_linear(teacher, Moments.of(inputs("plain").float()), rank=3)
    student.save(tmp_path / "s.safetensors", certificate)
    loaded, same = LowRankLinear.load(tmp_path / "s.safetensors")
    x = torch.randn(5, 24)
    assert torch.equal(loaded(x), student(x)) and same == certificate
    (tmp_path / "t.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="required, got"):
        LowRankLinear.load(tmp_path / "t.safetensors")


def test_a_student_is_a_plain_module():
    student, _ = compress_linear(nn.Linear(24, 12), Moments.of(inputs("plain").float()), rank=3)
    x = torch.randn(5, 24)
    exported = torch.export.export(student, (x,)).module()
    torch.testing.assert_close(exported(x), student(x))
    student(x).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert student.to(torch.float64)(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "arguments", [{"rank": 0}, {"rank": 25}, {"fvu": 1.0}, {"fvu": -0.1}, {}, {"rank": 3, "fvu": 0.1}]
)
def test_impossible_requests_say_what_is_possible(arguments):
    with pytest.raises(ValueError, match=r"must be|required"):
        compress_linear(nn.Linear(24, 24), Moments.of(inputs("plain")), **arguments)


def test_moments_of_another_width_are_refused():
    with pytest.raises(ValueError, match="moments of 30 features required for this layer, got 24"):
        compress_linear(nn.Linear(30, 24), Moments.of(inputs("plain")), rank=2)


def test_smallest_rank_counts_what_is_above():
    assert smallest_rank(torch.tensor([1.0, 0.4, 0.09, 0.01]), 0.1) == 2
    assert smallest_rank(torch.tensor([0.0, 0.0]), 0.1) == 1
