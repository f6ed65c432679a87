"""Folds hide what they should; the ridge path predicts what refitting without the rows would."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.nested import ridge_loop
from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator
from distil_rank.nested.probe import (
    FOLDS,
    PENALTIES,
    SCHEMES,
    RidgePath,
    folds,
    one_hot,
    score_features,
    spearman,
    standardized,
)
from distil_rank.proteins.variants import read_assay
from tests.proteins.test_variants import synthetic, write_assay


def problem(n, d, outputs=1, seed=0):
    draw = generator(seed, "ridge")
    x = torch.randn(n, d, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, d) + 5
    y = x @ torch.randn(d, outputs, generator=draw, dtype=torch.float64)
    return x, y + 0.3 * torch.randn(n, outputs, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (60, 59), (60, 60), (60, 61), (40, 200)])
def test_nested_equals_a_loop_of_fits(n, d):
    x, y = problem(n, d)
    fold = torch.arange(n) % 5
    path = RidgePath(x)
    predictions, chosen = path.nested(y[:, 0], fold)
    slow, slow_chosen = ridge_loop(x.numpy(), y[:, 0].numpy(), fold.numpy(), path.penalties.numpy())
    np.testing.assert_allclose(chosen.numpy(), slow_chosen)
    np.testing.assert_allclose(predictions.numpy(), slow, atol=1e-7 * float(y.abs().max()))


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 40), st.integers(1, 60), st.integers(1, 3), st.integers(0, 10**6), st.data())
def test_leaving_out_equals_refitting(n, d, outputs, seed, data):
    x, y = problem(n, d, outputs, seed)
    size = data.draw(st.integers(1, n - 3))
    rows = torch.randperm(n, generator=generator(seed, "rows"))[:size]
    rest = torch.ones(n, dtype=torch.bool)
    rest[rows] = False
    path = RidgePath(x)
    for i in (4, 10, 20):  # the smallest penalties are compared in the test above
        centred = x[rest] - x[rest].mean(0)
        gram = centred.T @ centred + path.penalties[i] * torch.eye(d).double()
        weights = torch.linalg.solve(gram, centred.T @ (y[rest] - y[rest].mean(0)))
        slow = (x[rows] - x[rest].mean(0)) @ weights + y[rest].mean(0)
        torch.testing.assert_close(path.leave_out(y, rows)[i], slow, rtol=1e-6, atol=1e-6)


def test_constant_features_predict_the_mean_of_the_other_folds():
    _, y = problem(50, 20)
    fold = torch.arange(50) % 5
    constant, _ = RidgePath(torch.ones(50, 4)).nested(y[:, 0], fold)
    for f in range(5):
        torch.testing.assert_close(constant[fold == f], y[fold != f].mean().expand(10))


def test_bad_input():
    with pytest.raises(InputError, match="finite features"):
        RidgePath(torch.full((5, 2), torch.nan))
    with pytest.raises(InputError, match="at least 3 folds"):
        RidgePath(torch.eye(6)).nested(torch.arange(6.0), torch.arange(6) % 2)
    assert len(PENALTIES) == 21


@pytest.mark.parametrize("seed", range(3))
def test_one_hot_collapses_on_contiguous_folds_but_not_on_random_ones(tmp_path, seed):
    assay = read_assay(write_assay(tmp_path / "dms", lines=synthetic(seed)))
    score = score_features(one_hot(assay), assay)
    assert score["random"] > 0.4
    assert abs(score["contiguous"]) < 0.2 and abs(score["modulo"]) < 0.2


def test_noise_predicts_nothing_in_any_scheme(tmp_path):
    """A training mean is low where its fold is high: in raw units noise ranks folds reversely."""
    found, raw = [], []
    for seed in range(40):
        assay = read_assay(write_assay(tmp_path / "dms", lines=synthetic(seed, 12)))
        noise = torch.randn(len(assay.scores), 16, generator=generator(seed, "noise"))
        found.append(list(score_features(noise, assay).values()))
        path, fold = RidgePath(noise), folds(assay.positions, "contiguous")
        raw.append(spearman(path.nested(assay.scores, fold)[0].numpy(), assay.scores.numpy()))
    assert np.abs(np.mean(found, 0)).max() < 0.02 and np.mean(raw) < -0.1


def test_units_of_the_training_folds_and_official_folds(tmp_path):
    assay = read_assay(write_assay(tmp_path / "dms"))
    y, fold = assay.scores, folds(assay.positions, "modulo")
    units = standardized(y, y, fold)
    rest = y[fold != 3].numpy()
    expected = (y[fold == 3].numpy() - rest.mean()) / rest.std()
    np.testing.assert_allclose(units[fold == 3].numpy(), expected)
    torch.testing.assert_close(standardized(3 * y + 5, 3 * y + 5, fold), units)
    features = one_hot(assay)
    swapped = replace(assay, folds={"random": fold})
    assert score_features(features, swapped)["random"] == score_features(features, assay)["modulo"]
    assert set(score_features(features, swapped)) == set(SCHEMES)


def test_schemes(tmp_path):
    assay = read_assay(write_assay(tmp_path / "dms"))
    position = torch.tensor([p[0] for p in assay.positions])
    sites = sorted({p[0] for p in assay.positions})
    random, modulo, contiguous = (
        folds(assay.positions, s) for s in ("random", "modulo", "contiguous")
    )
    for fold in (random, modulo, contiguous):
        assert fold.unique().tolist() == list(range(FOLDS))
    assert random.bincount().max() - random.bincount().min() <= 1
    assert torch.equal(random, folds(assay.positions, "random")) and not torch.equal(
        random, folds(assay.positions, "random", 1)
    )
    assert modulo.tolist() == [sites.index(p) % 5 for p in position.tolist()]
    order = position.argsort(stable=True)
    assert (contiguous[order].diff() >= 0).all()  # stretches
    for fold in (modulo, contiguous):  # no position on two sides
        assert all(len(fold[position == p].unique()) == 1 for p in position.unique())
    with pytest.raises(InputError, match="one of the schemes"):
        folds(assay.positions, "contigous")
