"""LowRankLinear: a plain module, the same after a file, ordered factors."""

import pytest
import torch

from distil_rank import LowRankLinear, Moments, compress_linear
from tests.core.rows import layer, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_truncated_student_is_the_student_of_that_rank(dtype):
    x, teacher = rows().to(dtype), layer(40, bias=False).to(dtype)
    large, small = (compress_linear(teacher, Moments.of(x), rank=r)[0] for r in (9, 4))
    other = LowRankLinear(torch.zeros(9, 24), torch.zeros(40, 9), torch.zeros(40)).to(dtype)
    other.load_state_dict(large.state_dict(), strict=True)
    for student in (large, other):
        cut = student.truncate(6).truncate(4)
        torch.testing.assert_close(cut(x), small(x))
        torch.testing.assert_close(cut.B.weight @ cut.A.weight, small.B.weight @ small.A.weight)
        torch.testing.assert_close(cut.B.bias, small.B.bias)


def test_a_student_without_the_mean_of_its_inner_features_is_not_truncated():
    student, _ = compress_linear(layer(12), Moments.of(rows()), rank=5)
    plain = LowRankLinear(student.A.weight, student.B.weight, student.B.bias)
    with pytest.raises(ValueError, match="compress_linear required"):
        plain.truncate(3)
    student.load_state_dict(plain.state_dict(), strict=True)
    with pytest.raises(ValueError, match="compress_linear required"):
        student.truncate(3)


def test_a_student_is_a_plain_module():
    student, _ = compress_linear(layer(12).float(), Moments.of(rows().float()), rank=3)
    x = torch.randn(5, 24)
    exported = torch.export.export(student, (x,)).module()
    torch.testing.assert_close(exported(x), student(x))
    student(x).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert student.to(torch.float64)(x.double()).dtype == torch.float64
