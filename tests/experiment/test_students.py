import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.core.lowrank import truncated_svd
from distil_rank.core.randomness import generator
from distil_rank.experiment.students import Recipe, distill, distillation_loss
from tests import reference


def problem(k: int = 3, n: int = 60, d_in: int = 10, d_out: int = 8, rank: int = 3):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, d_in, generator=g, dtype=torch.float64) + 1
    weights = torch.randn(k, d_out, d_in, generator=g, dtype=torch.float64)
    A, B = (torch.stack(f) for f in zip(*(truncated_svd(w, rank) for w in weights)))
    return x, x @ weights.mT, A, B, torch.zeros(k, d_out, dtype=torch.float64)


def batches(seeds: int = 3):
    return [generator(seed, "batches") for seed in range(seeds)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.floats(0, 2))
def test_the_written_gradient_is_autograds(seed, weight):
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(2, 5, 7, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    losses = torch.stack([reference.combined_loss(a, b, weight) for a, b in zip(p, y)])
    (expected,) = torch.autograd.grad(losses.sum(), p)
    loss, gradient = distillation_loss(p.detach(), y, weight)
    torch.testing.assert_close(loss, losses.detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("error", [1e-1, 1e-3, 1e-5])
def test_the_loss_does_not_cancel_in_float32(source, error):
    """A student next to its teacher, both nearly one vector, as on variants of one protein."""
    y = torch.randn(1, 1, 320, generator=source) + 1e-3 * torch.randn(1, 64, 320, generator=source)
    p = y + error * torch.randn(1, 64, 320, generator=source)
    found, gradient = distillation_loss(p, y, 1.0)
    expected, exact = distillation_loss(p.double(), y.double(), 1.0)
    assert float(found) > 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_training_together_is_training_alone_with_a_plain_loop():
    x, outputs, A, B, b = problem()
    recipe = Recipe(steps=30, batch=16)
    options = recipe.lr, recipe.weight_decay, recipe.cosine_weight
    together = distill(x, outputs, (A, B, b), recipe, batches())
    for i in range(3):
        start = A[i], B[i], b[i], recipe.steps, recipe.batch
        *alone, losses = reference.distill_one(x, outputs[i], *start, *options, batches()[i])
        for found, expected in zip(together, alone):
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
        expected = torch.tensor(losses, dtype=torch.float64)
        torch.testing.assert_close(together[3][i], expected, rtol=1e-4, atol=1e-6)


def test_step_0_is_the_warm_start_and_the_start_is_left_alone():
    x, outputs, A, B, b = problem()
    before = A.clone(), B.clone(), b.clone()
    *_, losses = distill(x, outputs, (A, B, b), Recipe(steps=1, batch=20), batches())
    for i in range(3):
        rows = torch.randint(len(x), (20,), generator=generator(i, "batches"))
        start = x[rows] @ A[i].T @ B[i].T + b[i]
        expected = reference.combined_loss(start, outputs[i][rows], 0.1)
        torch.testing.assert_close(losses[i, 0], expected)
    assert all(torch.equal(old, new) for old, new in zip(before, (A, B, b)))


def test_centering_changes_the_path_and_not_the_student():
    x, outputs, A, B, b = problem()
    x, outputs = x + 5, outputs + 1
    recipes = [Recipe(steps=2, center=center) for center in (False, True)]
    plain, centered = (distill(x, outputs, (A, B, b), recipe, batches())[3] for recipe in recipes)
    torch.testing.assert_close(plain[:, 0], centered[:, 0])
    recipe = Recipe(steps=1, center=True, lr=0.0, weight_decay=0.0)
    still = distill(x, outputs, (A, B, b), recipe, batches())
    for found, start in zip(still, (A, B, b)):
        torch.testing.assert_close(found, start)


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [Recipe(steps=100, warmup=0.1, decay_lr=True).lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(3e-4, rel=1e-3) and max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 1e-5
    assert {Recipe(steps=100).lr_at(step) for step in range(100)} == {3e-3}


def test_training_lowers_the_loss_and_two_runs_are_bit_equal():
    x, outputs, A, B, b = problem()
    recipe = Recipe(steps=200, decay_lr=True)
    runs = [distill(x, outputs, (A, B, b), recipe, batches()) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs))
    losses = runs[0][3]
    assert bool((losses[:, -20:].mean(1) < losses[:, 0]).all())
