"""LowRankLinear: a plain module, the same after a file, ordered factors."""

import pytest
import torch

from distil_rank import LowRankLinear, Moments, compress_linear
from distil_rank.core.errors import InputError
from tests.core.rows import layer, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_truncated_student_is_the_student_of_that_rank(dtype, tmp_path):
    x, teacher = rows().to(dtype), layer(40, bias=False).to(dtype)
    large, small = (compress_linear(teacher, Moments.of(x), rank=r)[0] for r in (9, 4))
    large.save(tmp_path / "s.safetensors")
    other = LowRankLinear(torch.zeros(9, 24), torch.zeros(40, 9), torch.zeros(40)).to(dtype)
    other.load_state_dict(large.state_dict(), strict=True)
    for student in (large, LowRankLinear.load(tmp_path / "s.safetensors")[0], other):
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


def test_a_saved_student_is_the_same_student(tmp_path):
    student, certificate = compress_linear(layer(12), Moments.of(rows()), rank=3)
    student.save(tmp_path / "s.safetensors", certificate)
    loaded, same = LowRankLinear.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded(rows()), student(rows())) and same == certificate
    (tmp_path / "t.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="required, got"):
        LowRankLinear.load(tmp_path / "t.safetensors")


def test_a_student_is_a_plain_module():
    student, _ = compress_linear(layer(12).float(), Moments.of(rows().float()), rank=3)
    x = torch.randn(5, 24)
    exported = torch.export.export(student, (x,)).module()
    torch.testing.assert_close(exported(x), student(x))
    student(x).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert student.to(torch.float64)(x.double()).dtype == torch.float64
