import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.core.lowrank import optimum, truncated_svd
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.experiment.students import (
    RATES,
    Recipe,
    distill,
    distillation_loss,
    pilot,
    pilot_steps,
    shrunk,
)
from distil_rank.experiment.teachers import random_teacher
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
    before, recipe = (A.clone(), B.clone(), b.clone()), Recipe(steps=30, batch=16)
    options = recipe.lr, recipe.weight_decay, recipe.cosine_weight
    together = distill(x, outputs, (A, B, b), recipe, batches())
    assert all(torch.equal(old, new) for old, new in zip(before, (A, B, b)))
    for i in range(3):
        start = A[i], B[i], b[i], recipe.steps, recipe.batch
        *alone, losses = reference.distill_one(x, outputs[i], *start, *options, batches()[i])
        for found, expected in zip(together, alone):
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
        expected = torch.tensor(losses, dtype=torch.float64)
        torch.testing.assert_close(together[3][i], expected, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_pilot_takes_the_rate_that_ends_lowest_on_training_batches(scale):
    x, outputs, A, B, b = problem()
    x, outputs, B = x * scale, outputs * scale, B / 1.3
    recipe, calls = Recipe(steps=200, decay_lr=True), []
    start = A, B, b
    chosen, found = pilot(
        x, outputs, start, recipe, lambda: generator(0, "pilot"), lambda: calls.append(1)
    )
    ends = {}
    for rate in RATES:
        again = Recipe(steps=100, decay_lr=True, lr=rate)
        first = tuple(part[:1] for part in start)
        *_, loss = distill(x, outputs[:1], first, again, [generator(0, "pilot")])
        ends[rate] = float(loss[0, -10:].mean())
    assert found["loss"] == {f"{rate:g}": loss for rate, loss in ends.items()}
    assert chosen.lr == found["learning_rate"] == min(ends, key=ends.get)
    assert chosen.steps == 200 and len(calls) == pilot_steps(200) == 300


@pytest.mark.parametrize(("n", "spread"), [(10, 0), (10, 2), (3000, 2)])
def test_shrinkage_helps_where_rows_are_few_and_never_costs_much(n, spread):
    source = torch.Generator().manual_seed(1)
    teacher, scales = random_teacher(12, 0), torch.logspace(0, -spread, 12)
    x, held_out = (torch.randn(k, 12, generator=source) * scales for k in (n, 2000))
    (student,), weight = shrunk([teacher], [Moments.of(part) for part in x.chunk(5)], 6)
    plain = optimum(teacher.weight, teacher.bias, Moments.of(x)).student(6, torch.float32)
    ours, theirs = ((s(held_out) - teacher(held_out)).square().sum() for s in (student, plain))
    assert ours <= 1.01 * theirs and (weight == 0 or ours < theirs)
