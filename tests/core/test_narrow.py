"""The narrow student of a function: never worse than the closed form, bent where it helps."""

import pytest
import torch
from torch import nn

from distil_rank.core.errors import InputError
from distil_rank.core.functions import distill_function, fvu
from distil_rank.core.heads import UnitNorm
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.narrow import PartGELU, distill_narrow
from tests.core.rows import draw, layer


def cloud(n: int, seed: int = 1) -> torch.Tensor:
    return draw(n, 24, seed=seed).float() @ (0.5 * draw(24, 24, seed=2).float()) + 0.2


def bent() -> nn.Sequential:
    """Linear but for two bent directions, each of which moves every output."""
    inner = layer(12, 24).float()
    with torch.no_grad():
        inner.weight *= 0.5
    return nn.Sequential(inner, PartGELU(10), layer(10, 12, seed=20).float()).eval()


@pytest.mark.parametrize(("after", "share"), [(nn.Identity(), 0.6), (UnitNorm(), 1.0)])
def test_a_bent_function_is_met_where_no_linear_map_meets_it(after, share):
    f, x, held = bent(), cloud(600), cloud(500, seed=3)
    student, found = distill_narrow(f, x, 12, after, steps=600)
    with torch.no_grad():
        y = after(f(held))
        ours = fvu(after(student(held)), y)
        linear = fvu(after(distill_function(f, x, 10)[0](held)), y)
        assert found.achieved_fvu == pytest.approx(fvu(after(student(x)), after(f(x))))
    assert ours < share * linear and found.achieved_fvu < found.linear_fvu
    assert found.bent > 0 and student[1].linear == 12 - found.bent
    assert student[0].weight.shape == (12, 24) and student[2].weight.shape == (10, 12)
    assert found.aside_fvu[found.bent] == min(found.aside_fvu.values()) < found.aside_fvu[0]


@pytest.mark.parametrize(("f", "n"), [(layer().float(), 200), (bent(), 5)])
def test_where_bending_does_not_help_or_cannot_be_judged_it_is_the_closed_form(f, n):
    x = cloud(n)
    student, found = distill_narrow(f, x, 6, steps=60)
    expected, _ = distill_function(f, x, 6)
    assert isinstance(student, LowRankLinear) and found.bent == 0
    torch.testing.assert_close(student(x), expected(x))


def test_two_runs_are_bit_equal_and_the_function_is_left_alone():
    f, x = bent(), cloud(200)
    before = {name: p.clone() for name, p in f.state_dict().items()}
    first, second = (distill_narrow(f, x, 8, steps=50) for _ in range(2))
    assert torch.equal(first[0](x), second[0](x)) and first[1] == second[1]
    assert all(torch.equal(p, before[name]) for name, p in f.state_dict().items())
    assert all(p.grad is None for p in f.parameters())


def test_a_width_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        distill_narrow(bent(), cloud(50), 0)
