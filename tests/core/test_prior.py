"""Prior moments: used where they help, left out where they do not."""

import pytest
import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import optimum, optimum_from_outputs
from distil_rank.core.moments import Moments
from distil_rank.core.prior import WEIGHTS, Blend, blended, blended_moments, choose, folds_of
from tests.core.rows import draw
from tests.core.rows import loss as squared_error


def rows(n: int, seed: int, domain: int = 0, d: int = 60) -> Tensor:
    """Rows (n, d) of one of several distributions."""
    scales = torch.logspace(0, -2, d, dtype=torch.float64)
    mix, mean = draw(d, d, seed=1000 + domain) * scales, draw(d, seed=2000 + domain)
    return draw(n, d, seed=seed) @ mix.T + mean


def loss(W: Tensor, x: Tensor, moments: Moments, rank: int) -> float:
    return squared_error(optimum(W, None, moments).student(rank)(x), x @ W.T)


@pytest.mark.parametrize("shape", [(60, 60), (20, 60), (90, 60)])
def test_a_good_prior_helps_and_a_bad_one_is_not_used(shape):
    W = draw(*shape, seed=3)
    own, held = rows(25, seed=1), rows(2000, seed=2)
    alone = loss(W, held, Moments.of(own), 8)
    good, blend = blended_moments(W, "input", folds_of(own), Moments.of(rows(3000, seed=5)), 8)
    full = loss(W, held, Moments.of(rows(3000, seed=5)), 8)
    assert blend.weight > 0 and blend.relative_loss < 1
    assert loss(W, held, good, 8) < 0.8 * alone and loss(W, held, good, 8) < 1.25 * full
    bad, blend = blended_moments(
        W, "input", folds_of(own), Moments.of(rows(3000, seed=5, domain=1)), 8
    )
    assert loss(W, held, bad, 8) < 1.01 * alone


@pytest.mark.parametrize("shape", [(60, 60), (20, 60), (90, 60)])
def test_without_a_prior_the_weights_own_takes_its_place(shape):
    """Nearly isotropic inputs: drawn to W W^T, few rows lose less.

    A low-rank cloud, where it could only harm: left alone.
    """
    W = draw(*shape, seed=3)
    W = W * torch.logspace(
        0, -1, 60, dtype=torch.float64
    )  # so that there is something to be drawn to
    flat = [draw(n, 60, seed=n) for n in (30, 2000)]
    found, blend = blended_moments(W, "input", folds_of(flat[0]), None, 8)
    assert blend.weight > 0 and blend.mean_weight == 0
    assert loss(W, flat[1], found, 8) < 0.95 * loss(W, flat[1], Moments.of(flat[0]), 8)
    outputs, same = blended_moments(W, "output", folds_of(flat[0] @ W.T), None, 8)
    assert same.weight == blend.weight and same.relative_loss == pytest.approx(blend.relative_loss)
    best = optimum_from_outputs(W, None, outputs, 8), optimum(W, None, found, 8)
    torch.testing.assert_close(*(b.student(8)(flat[1]).detach() for b in best))
    thin = flat[0][:, :5] @ draw(5, 60, seed=4)
    _, blend = blended_moments(W, "input", folds_of(thin), None, 8)
    assert blend == Blend(0.0, 0.0, 1.0)


def test_zero_weight_is_no_prior():
    W, own = torch.eye(60, dtype=torch.float64), rows(500, seed=1)
    found, blend = blended_moments(
        W, "input", folds_of(own), Moments.of(rows(500, seed=2, domain=1) + 7), 5
    )
    assert blend == Blend(0.0, 0.0, 1.0)
    torch.testing.assert_close(found.covariance, Moments.of(own).covariance)
    only = choose(folds_of(own)[:1], Moments.of(own), 5, WEIGHTS, W)
    assert only == Blend(0.0, 0.0, 1.0)  # one fold: nothing to validate on


def test_a_blend_is_what_it_says():
    a, b = Moments.of(rows(50, seed=1, d=6)), Moments.of(rows(70, seed=2, domain=1, d=6))
    both = blended(a, b, Blend(0.3, 0.1, 1.0))
    torch.testing.assert_close(both.covariance, 0.7 * a.covariance + 0.3 * b.covariance)
    torch.testing.assert_close(both.mean, 0.9 * a.mean + 0.1 * b.mean)
    assert both.count == a.count


def test_a_prior_of_another_width_is_refused():
    with pytest.raises(InputError, match="a prior of 60 features required for this layer, got 7"):
        blended_moments(draw(4, 60), "input", folds_of(rows(30, 1)), Moments.of(draw(9, 7)), 2)


def test_a_bad_prior_is_not_preferred_to_directions_that_the_rows_leave_open():
    """More ranks than rows: a prior has to beat the order of W W^T."""
    W = draw(60, 60, seed=3) * torch.logspace(0, -2, 60, dtype=torch.float64)
    own, held = draw(15, 60, seed=1), draw(2000, 60, seed=2)
    scales = torch.logspace(-2, 0, 60, dtype=torch.float64)  # wide where W reads little
    found, _ = blended_moments(
        W, "input", folds_of(own), Moments.of(draw(3000, 60, seed=5) * scales), 20
    )
    assert loss(W, held, found, 20) < 1.02 * loss(W, held, Moments.of(own), 20)
