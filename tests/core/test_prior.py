"""Prior moments: used where they help, left out where they do not, the same in files."""

import pytest
import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.compress.calibration import collect
from distil_rank.compress.models import compress_model
from distil_rank.core.prior import (
    FOLDS,
    WEIGHTS,
    Blend,
    blended,
    blended_moments,
    choose,
    load_prior,
    mapped,
    save_prior,
)
from distil_rank.compress.sites import find_sites, trace
from distil_rank.core.lowrank import spectrum_from_inputs, spectrum_from_outputs
from distil_rank.core.moments import Moments
from tests.compress.small_models import small_model, token_batches


def rows(n: int, seed: int, domain: int = 0, d: int = 60) -> Tensor:
    source = torch.Generator().manual_seed(1000 + domain)
    mix = torch.randn(d, d, generator=source, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)
    mean = torch.randn(d, generator=source, dtype=torch.float64)
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ mix.T + mean


def loss(W: Tensor, x: Tensor, moments: Moments, rank: int) -> float:
    student = spectrum_from_inputs(W, moments).student(W, None, rank)
    return float((student(x) - x @ W.T).square().sum().detach())


def folds_of(x: Tensor) -> list[Moments]:
    return [Moments.of(x[f::FOLDS]) for f in range(FOLDS)]


@pytest.mark.parametrize("shape", [(60, 60), (20, 60), (90, 60)])
def test_a_good_prior_helps_and_a_bad_one_is_not_used(shape):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own, held = rows(25, seed=1), rows(2000, seed=2)
    alone = loss(W, held, Moments.of(own), 8)
    good, blend = blended_moments(W, "input", folds_of(own), Moments.of(rows(3000, seed=5)), 8)
    full = loss(W, held, Moments.of(rows(3000, seed=5)), 8)
    assert blend.weight > 0 and blend.relative_loss < 1
    assert loss(W, held, good, 8) < 0.8 * alone and loss(W, held, good, 8) < 1.25 * full
    bad, blend = blended_moments(W, "input", folds_of(own), Moments.of(rows(3000, seed=5, domain=1)), 8)
    assert loss(W, held, bad, 8) < 1.01 * alone


@pytest.mark.parametrize("shape", [(60, 60), (20, 60), (90, 60)])
def test_without_a_prior_the_weights_own_takes_its_place(shape):
    """Nearly isotropic inputs: drawn to W W^T, few rows lose less. A low-rank cloud, where it could only harm: left alone."""
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    W = W * torch.logspace(0, -1, 60, dtype=torch.float64)  # so that there is something to be drawn to
    flat = [torch.randn(n, 60, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (30, 2000)]
    found, blend = blended_moments(W, "input", folds_of(flat[0]), None, 8)
    assert blend.weight > 0 and blend.mean_weight == 0
    assert loss(W, flat[1], found, 8) < 0.95 * loss(W, flat[1], Moments.of(flat[0]), 8)
    outputs, same = blended_moments(W, "output", folds_of(flat[0] @ W.T), None, 8)
    assert same.weight == blend.weight and same.relative_loss == pytest.approx(blend.relative_loss)
    students = spectrum_from_outputs(W, None, outputs, 8), spectrum_from_inputs(W, found, 8)
    torch.testing.assert_close(*(s.student(W, None, 8)(flat[1]).detach() for s in students))
    thin = flat[0][:, :5] @ torch.randn(5, 60, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    _, blend = blended_moments(W, "input", folds_of(thin), None, 8)
    assert blend == Blend(0.0, 0.0, 1.0)


def test_zero_weight_is_no_prior():
    W, own = torch.eye(60, dtype=torch.float64), rows(500, seed=1)
    found, blend = blended_moments(W, "input", folds_of(own), Moments.of(rows(500, seed=2, domain=1) + 7), 5)
    assert blend == Blend(0.0, 0.0, 1.0)
    torch.testing.assert_close(found.covariance, Moments.of(own).covariance)
    only = choose(folds_of(own)[:1], Moments.of(own), 5, WEIGHTS)
    assert only == Blend(0.0, 0.0, 1.0)  # one fold: nothing to validate on


def test_blend_and_map_are_what_they_say():
    a, b = Moments.of(rows(50, seed=1, d=6)), Moments.of(rows(70, seed=2, domain=1, d=6))
    both = blended(a, b, Blend(0.3, 0.1, 1.0))
    torch.testing.assert_close(both.covariance, 0.7 * a.covariance + 0.3 * b.covariance)
    torch.testing.assert_close(both.mean, 0.9 * a.mean + 0.1 * b.mean)
    assert both.count == a.count
    W = torch.randn(4, 6, dtype=torch.float64)
    direct = Moments.of(rows(50, seed=1, d=6) @ W.T)
    torch.testing.assert_close(mapped(a, W).scatter, direct.scatter)
    torch.testing.assert_close(mapped(a, W).mean, direct.mean)


def test_files_round_trip_and_are_checked(tmp_path):
    model = small_model("fair-esm")
    batches = token_batches(model)
    sites = find_sites(model, include=("layers.*",))
    (found,) = collect(model, batches, sites, trace(model, batches[0], sites))
    save_prior(tmp_path / "prior.safetensors", {k: (s.side, s.moments) for k, s in found.items()}, model="small")
    loaded = load_prior(tmp_path / "prior.safetensors")
    assert loaded.keys() == found.keys()
    for name, (side, moments) in loaded.items():
        assert side == found[name].side and torch.equal(moments.scatter, found[name].moments.scatter)
    assert loaded["layers.0.self_attn.q_proj"][1] is loaded["layers.0.self_attn.k_proj"][1]  # stored once
    Moments.of(torch.randn(20, 8)).save(tmp_path / "plain.safetensors")
    assert load_prior(tmp_path / "plain.safetensors")[""][1].dim == 8
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("broken.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match="readable"):
            load_prior(tmp_path / name)


def test_a_models_prior_improves_a_model_fitted_on_little(tmp_path):
    model = small_model("EsmModel")
    sites = find_sites(model, exclude=("*contact*", "*pooler*"))
    many, tests = token_batches(model, count=12, seed=1), token_batches(model, count=4, seed=2)
    (found,) = collect(model, many, sites, trace(model, many[0], sites))
    prior = {k: (s.side, s.moments) for k, s in found.items()}
    few = token_batches(model, count=5, rows=1, length=9, seed=3)
    options = {"ratio": 0.4, "held_out": tests, "method": "uniform", "exclude": ("*contact*", "*pooler*")}
    _, alone = compress_model(model, few, **options)
    _, helped = compress_model(model, few, prior=prior, **options)
    assert helped.mean_fvu < alone.mean_fvu
    assert any(x.prior_weight for x in helped.layers)
