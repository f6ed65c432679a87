import torch
from distil_rank.experiment.cosine import cosine_aware_optimum, cosine_bound

from distil_rank import LowRankLinear, Moments
from distil_rank.core.lowrank import optimum
from tests import reference


def problem(d: int = 20, n: int = 300):
    g = torch.Generator().manual_seed(2)
    x = (
        torch.randn(n, d, generator=g, dtype=torch.float64)
        * (1 + 3 * torch.rand(n, 1, generator=g, dtype=torch.float64))
        + 0.3
    )
    weight = torch.randn(d, d, generator=g, dtype=torch.float64)
    bias = torch.randn(d, generator=g, dtype=torch.float64)
    return x, weight, bias, x @ weight.T + bias


def test_it_lowers_the_combined_loss_of_the_plain_optimum():
    x, weight, bias, y = problem()
    A, B, b, losses = cosine_aware_optimum(weight, bias, y, 4, cosine_weight=5.0)
    found = reference.combined_loss(x @ A.T @ B.T + b, y, 5.0)
    plain = reference.combined_loss(
        optimum(weight, bias, Moments.of(x)).student(4)(x).detach(), y, 5.0
    )
    assert float(found) < float(plain)
    assert (losses == sorted(losses, reverse=True) and losses[-1] == float(found)) or abs(
        losses[-1] - float(found)
    ) < 1e-9


def test_without_a_cosine_term_it_is_the_plain_optimum():
    x, weight, bias, y = problem()
    A, B, b, _ = cosine_aware_optimum(weight, bias, y, 4, cosine_weight=0.0)
    torch.testing.assert_close(
        x @ A.T @ B.T + b, optimum(weight, bias, Moments.of(x)).student(4)(x).detach()
    )


def test_it_is_a_stationary_point_within_its_second_order_approximation():
    x, weight, bias, y = problem()
    A, B, b, _ = cosine_aware_optimum(weight, bias, y, 10, cosine_weight=0.5)
    student = LowRankLinear(A, B, b)
    start = float(reference.combined_loss(student(x).detach(), y, 0.5))
    optimiser = torch.optim.LBFGS(student.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = reference.combined_loss(student(x), y, 0.5)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float(closure()) > 0.97 * start


def test_no_student_passes_the_cosine_bound_and_it_is_nearly_reached():
    x, weight, bias, y = problem()
    for rank in (2, 12):
        bound = cosine_bound(y, rank)
        student = optimum(weight, bias, Moments.of(x)).student(rank)
        optimiser = torch.optim.LBFGS(
            student.parameters(), max_iter=40, line_search_fn="strong_wolfe"
        )

        def closure(student=student, optimiser=optimiser):
            optimiser.zero_grad()
            loss = 1 - torch.cosine_similarity(student(x), y).mean()
            loss.backward()
            return loss

        optimiser.step(closure)
        best = 1 - float(closure())
        assert best <= bound + 1e-12
        assert 1 - bound > 0.5 * (1 - best)
    assert abs(cosine_bound(y, 20) - 1) < 1e-12
