import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.core.lowrank import truncated_svd
from distil_rank.experiment.students import Recipe, distil, distillation_loss
from distil_rank.core.randomness import generator
from tests import reference


def problem(k: int = 3, n: int = 60, d_in: int = 10, d_out: int = 8, rank: int = 3):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, d_in, generator=g, dtype=torch.float64) + 1
    weights = torch.randn(k, d_out, d_in, generator=g, dtype=torch.float64)
    A, B = (torch.stack(f) for f in zip(*(truncated_svd(w, rank) for w in weights)))
    return x, x @ weights.mT, A, B, torch.zeros(k, d_out, dtype=torch.float64)


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


def test_training_together_is_training_alone_with_a_plain_loop():
    x, outputs, A, B, b = problem()
    recipe = Recipe(steps=30, batch=16)
    together = distil(x, outputs, A, B, b, recipe, [generator(s, "batches") for s in range(3)])
    for i in range(3):
        alone = reference.distil_one(
            x,
            outputs[i],
            A[i],
            B[i],
            b[i],
            30,
            16,
            recipe.lr,
            recipe.weight_decay,
            recipe.cosine_weight,
            generator(i, "batches"),
        )
        for found, expected in zip(together[:3], alone[:3]):
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[3][i], torch.tensor(alone[3], dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_step_0_is_the_warm_start_and_the_start_is_left_alone():
    x, outputs, A, B, b = problem()
    before = A.clone(), B.clone(), b.clone()
    *_, losses = distil(x, outputs, A, B, b, Recipe(steps=1, batch=20), [generator(s, "batches") for s in range(3)])
    for i in range(3):
        rows = torch.randint(len(x), (20,), generator=generator(i, "batches"))
        expected = reference.combined_loss(x[rows] @ A[i].T @ B[i].T + b[i], outputs[i][rows], 0.1)
        torch.testing.assert_close(losses[i, 0], expected)
    assert all(torch.equal(old, new) for old, new in zip(before, (A, B, b)))


def test_centring_changes_the_path_and_not_the_student():
    x, outputs, A, B, b = problem()
    batches = lambda: [generator(s, "batches") for s in range(3)]  # noqa: E731
    x = x + 5
    outputs = outputs + 1
    runs = [distil(x, outputs, A, B, b, Recipe(steps=2, centre=c), batches()) for c in (False, True)]
    torch.testing.assert_close(runs[0][3][:, 0], runs[1][3][:, 0])
    still = distil(x, outputs, A, B, b, Recipe(steps=1, centre=True, lr=0.0, weight_decay=0.0), batches())
    for found, start in zip(still[:3], (A, B, b)):
        torch.testing.assert_close(found, start)


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [Recipe(steps=100, warmup=0.1, decay_lr=True).lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(3e-4, rel=1e-3) and max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 1e-5
    assert {Recipe(steps=100).lr_at(step) for step in range(100)} == {3e-3}


def test_training_lowers_the_loss_and_two_runs_are_bit_equal():
    x, outputs, A, B, b = problem()
    runs = []
    for _ in range(2):
        batches = [generator(seed, "batches") for seed in range(3)]
        runs.append(distil(x, outputs, A, B, b, Recipe(steps=200, decay_lr=True), batches))
    assert all(torch.equal(first, second) for first, second in zip(*runs))
    losses = runs[0][3]
    assert bool((losses[:, -20:].mean(1) < losses[:, 0]).all())
