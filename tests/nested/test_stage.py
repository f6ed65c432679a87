"""A stage: equal to the slow version, orthogonal, optimal; its error is the residual's tail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.nested.stage import (
    PENALTIES,
    fit_stage,
    published_components,
    residual_covariance,
)
from tests import reference_nested as reference
from tests.nested.data import family

K, P = 7, 16


def pair(rows=400, seed=0, **more):
    raws = family(rows, (K, P), seed, **more)
    z, x = raws["a"], raws["b"]
    return z, x, Moments.of(torch.cat([z, x], 1))


def coefficients(z, x, regression, stage):
    z, x = z.numpy(), x.numpy()
    if regression == "ols":
        return reference.ols(z, x)
    if regression == "pcr":
        return reference.pcr(z, x, stage.fit.components)
    grid = (PENALTIES * np.trace(np.cov(z.T, bias=True)) / z.shape[1]).numpy()
    best = reference.gcv(z, x, grid)
    assert stage.fit.penalty == pytest.approx(best, rel=1e-9)
    return reference.ridge(z, x, best)


@pytest.mark.parametrize("components", ["mp", 3, 7])
@pytest.mark.parametrize("regression", ["ols", "ridge", "pcr"])
def test_equal_to_brute_force(regression, components):
    z, x, joint = pair()
    stage = fit_stage(joint, K, P - K, regression, components)
    slow = coefficients(z, x, regression, stage)
    residual, basis, variances = reference.stage(z.numpy(), x.numpy(), slow, P - K)
    np.testing.assert_allclose(stage.weight.numpy(), slow.T, atol=1e-8)
    np.testing.assert_allclose(stage.eigenvalues.numpy(), variances, atol=1e-8)
    np.testing.assert_allclose(stage.directions.numpy(), basis, atol=1e-8)
    np.testing.assert_allclose(stage.block(z, x).numpy(), residual @ basis, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["ols", "ridge", "pcr"]),
    st.integers(1, P - K),
    st.integers(0, 10**6),
    st.integers(60, 300),
)
def test_error_is_the_tail_of_the_residual_spectrum(regression, added, seed, rows):
    z, x, joint = pair(rows, seed)
    stage = fit_stage(joint, K, added, regression)
    error = (x - stage.reconstruct(z, stage.block(z, x))).square().sum(1).mean()
    tail, total = (float(stage.eigenvalues[start:].sum()) for start in (added, 0))
    assert float(error) == pytest.approx(tail, rel=1e-8, abs=1e-8 * total)


def test_no_random_completion_reconstructs_better():
    _, _, joint = pair()
    added = 5
    stage = fit_stage(joint, K, added, "ols")
    error, _ = residual_covariance(joint, stage)
    own = float(stage.eigenvalues[added:].sum())
    draws = torch.randn(1000, P, added, generator=generator(0, "completions"), dtype=torch.float64)
    bases = torch.linalg.qr(draws)[0]
    kept = torch.einsum("bpm,pq,bqm->b", bases, error, bases)
    assert own <= float((error.trace() - kept).min())


def test_ols_block_is_uncorrelated_with_the_prefix():
    z, x, joint = pair()
    block = fit_stage(joint, K, P - K, "ols").block(z, x)
    assert max_correlation(z, block) < 1e-10
    kept = fit_stage(joint, K, P - K, "pcr", 3)
    basis = torch.linalg.eigh(joint.covariance[:K, :K])[1].flip(1)
    assert max_correlation(z @ basis[:, :3], kept.block(z, x)) < 1e-10  # to the kept components
    assert max_correlation(z, kept.block(z, x)) > 0.01  # and only to those
    torch.testing.assert_close(
        fit_stage(joint, K, 4, "pcr", K).weight, fit_stage(joint, K, 4, "ols").weight
    )


def max_correlation(a, b):
    correlation = np.corrcoef(a.numpy().T, b.numpy().T)[: a.shape[1], a.shape[1] :]
    return np.abs(correlation).max()


@pytest.mark.parametrize("rows", [15, 41, 60, 81, 400, 5000])
@pytest.mark.parametrize("spectrum", [0.0, 0.5, 1.5, 3.0])
def test_components_are_those_of_the_released_rule(rows, spectrum):
    draw = generator(rows, "components")
    z = torch.randn(rows, 40, generator=draw, dtype=torch.float64) * torch.logspace(
        0, -spectrum, 40
    )
    L = torch.linalg.eigvalsh(Moments.of(z).covariance).flip(0)
    assert published_components(L, rows) == reference.published_components(z.numpy())


@pytest.mark.parametrize("rows", [40, 101, 102, 140])
def test_the_ridge_penalty_does_not_collapse_with_few_rows(rows):
    draw = generator(rows, "few rows")
    z = torch.randn(rows + 2000, 100, generator=draw, dtype=torch.float64)
    weights = torch.randn(100, 120, generator=draw, dtype=torch.float64)
    x = z @ weights + 12 * torch.randn(len(z), 120, generator=draw, dtype=torch.float64)
    stage = fit_stage(Moments.of(torch.cat([z, x], 1)[:rows]), 100, 5, "ridge")
    z, x = z.numpy(), x.numpy()

    def error(penalty):
        found = reference.ridge(z[:rows], x[:rows], penalty)
        predicted = (z[rows:] - z[:rows].mean(0)) @ found + x[:rows].mean(0)
        return float(((x[rows:] - predicted) ** 2).sum())

    grid = (PENALTIES[20:56:2] * np.trace(np.cov(z[:rows].T, bias=True)) / 100).tolist()
    assert error(stage.fit.penalty) <= 1.05 * min(map(error, grid))


def test_held_out_components_have_the_least_held_out_error():
    z, x, joint = pair(60, noise=2.0)
    z2, x2, held_out = pair(60, seed=0, noise=2.0)
    z2, x2 = z2[:30], x2[:30]
    joint, held_out = Moments.of(torch.cat([z, x], 1)[30:]), Moments.of(torch.cat([z2, x2], 1))
    stage = fit_stage(joint, K, 4, "pcr", "held-out", held_out=held_out)

    def error(q):
        other = fit_stage(joint, K, 4, "pcr", q)
        return float((x2 - other.reconstruct(z2, torch.zeros(30, 0))).square().sum())

    assert stage.fit.components == 1 + int(np.argmin([error(q) for q in range(1, K + 1)]))
    predicted = 1 - error(stage.fit.components) / float((x2 - x2.mean(0)).square().sum())
    assert stage.scores(held_out)["regression"] == pytest.approx(predicted, rel=1e-9)


def test_null_directions_of_the_prefix_are_harmless_and_signs_are_fixed():
    z, x, _ = pair()
    z = torch.cat([z[:, :-1], z[:, :-1].sum(1, keepdim=True)], 1)  # singular, as after a LayerNorm
    stage = fit_stage(Moments.of(torch.cat([z, x], 1)), K, P - K, "ols")
    assert stage.fit.rank == K - 1
    assert max_correlation(z, stage.block(z, x)) < 1e-8
    V = stage.directions
    assert bool((V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (16, {"regression": "ols"}, "at least 17 rows required"),
        (12, {"regression": "pcr", "components": 3}, "at least 13 rows required"),
        (400, {"regression": "lasso"}, "one of ols, ridge, pcr"),
        (400, {"regression": "pcr", "components": "johnstone"}, "mp, held-out or a number"),
        (400, {"regression": "pcr", "components": 0}, "at least 1"),
        (400, {"regression": "pcr", "components": "held-out"}, "held-out proteins required"),
    ],
)
def test_bad_input(rows, options, message):
    _, _, joint = pair(rows)
    with pytest.raises(InputError, match=message):
        fit_stage(joint, K, P - K, **options)


def test_a_larger_model_that_adds_nothing_is_an_error():
    z, x, _ = pair()
    x = torch.cat([z, z @ torch.ones(K, P - K, dtype=torch.float64)], 1)
    with pytest.raises(InputError, match="carry variance"):
        fit_stage(Moments.of(torch.cat([z, x], 1)), K, P - K, "ols")
