"""LowRankLinear: a plain module, the same after a file, ordered factors."""

import pytest
import torch

from distil_rank import LowRankLinear, Moments, compress_linear
from distil_rank.core.errors import InputError
from tests.core.rows import layer, rows


def test_factors_are_ordered():
    x, teacher = rows(), layer()
    large, small = (compress_linear(teacher, Moments.of(x), rank=r)[0] for r in (9, 4))
    cut = large.truncate(4)
    product = small.B.weight @ small.A.weight
    torch.testing.assert_close(cut.B.weight @ cut.A.weight, product)


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
