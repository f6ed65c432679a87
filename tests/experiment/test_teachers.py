import pytest
import torch
from torch import nn

from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.experiment.teachers import (
    NOISE,
    denoising,
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


def test_denoisers_come_near_the_wiener_filter_and_seeds_do_not_mix(source):
    x = torch.randn(400, 16, generator=source) @ torch.randn(16, 16, generator=source) * 0.3 + 5
    train, val = x[:300], x[300:]
    both = task_trained_teachers(train, [0, 1], steps=500)
    task = denoising(both, Moments.of(train), Moments.of(val))
    assert task["wiener_mse"] < task["mse"] < 2 * task["wiener_mse"] < 0.2 * task["constant_mse"]
    assert task["trained"] and not torch.equal(both[0].weight, both[1].weight)
    alone = task_trained_teachers(train, [1], steps=500)[0]
    torch.testing.assert_close(alone.weight, both[1].weight, rtol=1e-3, atol=1e-4)
    # noise is relative: another unit is the same task
    small = task_trained_teachers(train / 100, [0], steps=500)
    scaled = denoising(small, Moments.of(train / 100), Moments.of(val / 100))
    assert scaled["mse_per_seed"][0] == pytest.approx(task["mse_per_seed"][0] / 1e4, rel=0.02)


def test_the_error_on_the_task_is_the_mean_over_noise_and_no_better_filter_is_found(source):
    x = torch.randn(50, 4, generator=source, dtype=torch.float64) * torch.tensor([1, 2, 3, 4]) + 1
    moments = Moments.of(x)
    teacher = random_teacher(4, 0)
    task = denoising([teacher], moments, moments)
    noise = torch.randn(4000, 50, 4, generator=source) * NOISE * x.std(0, correction=0)
    noisy = (x + noise).float()
    assert task["mse"] == pytest.approx(float((teacher(noisy) - x).square().mean()), rel=0.02)
    assert task["constant_mse"] == pytest.approx(float(x.var(0, correction=0).mean()))
    flat, target = noisy.reshape(-1, 4), x.expand(4000, -1, -1).reshape(-1, 4).float()
    ones = torch.ones(len(flat), 1)
    fitted = torch.linalg.lstsq(torch.cat([flat, ones], 1), target).solution
    best = (torch.cat([flat, ones], 1) @ fitted - target).square().mean()
    assert task["wiener_mse"] == pytest.approx(float(best), rel=0.02)
    assert not task["trained"]


def test_task_trained_teacher_is_adam_on_the_denoising_loss(source):
    x = torch.randn(50, 6, generator=source) + 2
    (fast,) = task_trained_teachers(x, [0], steps=20)
    slow, mean, scale = nn.Linear(6, 6), x.mean(0), NOISE * x.std(0, correction=0)
    slow.load_state_dict(random_teacher(6, 0).state_dict() | {"bias": torch.zeros(6)})
    optimizer, draws = torch.optim.Adam(slow.parameters()), generator(0, "task-trained teacher")
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 20)
        rows, noise = torch.randint(50, (64,), generator=draws), torch.randn(64, 6, generator=draws)
        optimizer.zero_grad()
        clean = x[rows] - mean
        nn.functional.mse_loss(slow(clean + scale * noise), clean).backward()
        optimizer.step()
    torch.testing.assert_close(fast.weight, slow.weight.detach(), rtol=1e-4, atol=1e-6)
    expected = slow.bias.detach() + mean - slow.weight.detach() @ mean
    torch.testing.assert_close(fast.bias, expected, rtol=1e-4, atol=1e-6)
