import pytest
import torch
from torch import nn

from distil_rank.core.randomness import generator
from distil_rank.experiment.teachers import (
    random_teacher,
    spectral_teacher,
    task_trained_teachers,
)


def test_random_teacher_is_uniform_within_its_bound():
    teacher = random_teacher(400, 0)
    for p in (teacher.weight, teacher.bias):
        assert p.abs().max() <= 1 / 20 and float(p.abs().max()) > 0.98 / 20
    assert float(teacher.weight.var()) == pytest.approx((1 / 20) ** 2 / 3, rel=0.02)
    assert not torch.equal(teacher.weight, random_teacher(400, 1).weight)
    assert torch.equal(teacher.weight, random_teacher(400, 0).weight)


def test_spectral_teacher_has_its_spectrum():
    teacher = spectral_teacher(60, 0)
    expected = 2 * torch.exp(-torch.arange(60) / 100)
    torch.testing.assert_close(torch.linalg.svdvals(teacher.weight), expected, rtol=1e-4, atol=1e-5)
    assert not teacher.bias.any()


def test_task_trained_teacher_denoises_better_than_it_began_and_seeds_do_not_mix(source):
    x = torch.randn(200, 16, generator=source) @ torch.randn(16, 16, generator=source) * 0.3
    both = task_trained_teachers(x, [0, 1], steps=300)
    noisy = x + 0.3 * torch.randn(200, 16, generator=source)
    for seed, teacher in enumerate(both):
        before = (random_teacher(16, seed)(noisy) - x).square().mean()
        assert (teacher(noisy) - x).square().mean() < 0.5 * before
    torch.testing.assert_close(task_trained_teachers(x, [1], steps=300)[0].weight, both[1].weight)


def test_task_trained_teacher_is_adam_on_the_denoising_loss(source):
    x = torch.randn(50, 6, generator=source)
    (fast,) = task_trained_teachers(x, [0], steps=20)
    slow = nn.Linear(6, 6)
    slow.load_state_dict(random_teacher(6, 0).state_dict())
    optimizer, draws = (
        torch.optim.Adam(slow.parameters(), lr=1e-3),
        generator(0, "task-trained teacher"),
    )
    for _ in range(20):
        rows, noise = torch.randint(50, (64,), generator=draws), torch.randn(64, 6, generator=draws)
        optimizer.zero_grad()
        nn.functional.mse_loss(slow(x[rows] + 0.3 * noise), x[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(fast.weight, slow.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fast.bias, slow.bias.detach(), rtol=1e-4, atol=1e-6)
