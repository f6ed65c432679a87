import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distil_rank.core.errors import InputError
from distil_rank.experiment.teachers import (
    load_teacher,
    random_teacher,
    spectral_teacher,
    task_trained_teachers,
)
from distil_rank.core.randomness import generator


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
    optimiser, draws = (
        torch.optim.Adam(slow.parameters(), lr=1e-3),
        generator(0, "task-trained teacher"),
    )
    for _ in range(20):
        rows, noise = torch.randint(50, (64,), generator=draws), torch.randn(64, 6, generator=draws)
        optimiser.zero_grad()
        nn.functional.mse_loss(slow(x[rows] + 0.3 * noise), x[rows]).backward()
        optimiser.step()
    torch.testing.assert_close(fast.weight, slow.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fast.bias, slow.bias.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_users_layer_is_found_by_key(tmp_path, suffix):
    head = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    path = tmp_path / f"head{suffix}"
    if suffix == ".pt":
        torch.save({"model": head.state_dict()}, path)
        first, last = "model.0", "model.2"
    else:
        save_file(head.state_dict(), path)
        first, last = "0", "2"
    assert torch.equal(load_teacher(path, first).weight, head[0].weight)
    assert torch.equal(load_teacher(path, f"{first}.weight").bias, head[0].bias)
    assert load_teacher(path, last).bias is None
    with pytest.raises(InputError, match="--key"):
        load_teacher(path)
    with pytest.raises(InputError, match=r"key 'classifier' required .* which has layers"):
        load_teacher(path, "classifier")


def test_a_single_layer_needs_no_key(tmp_path):
    layer = nn.Linear(4, 2).half()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = load_teacher(tmp_path / "layer.pt")
    assert loaded.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.weight, layer.weight.float())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(3)}, "d_out, d_in"),
        ({"weight": torch.zeros(3, 2, dtype=torch.int64)}, "floating-point"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, r"bias \(3,\)"),
        ({"weight": torch.full((3, 2), float("nan"))}, "finite"),
        ({"bias": torch.zeros(2)}, "none"),
        (torch.zeros(3, 2), "state dict"),
    ],
)
def test_what_is_not_a_layer_is_refused(tmp_path, state, message):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        load_teacher(tmp_path / "x.pt")
