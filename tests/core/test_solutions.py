"""Spectra from either side, students on changed inputs and in an output metric, against brute force on the rows."""

import pytest
import torch
from torch import Tensor

from distil_rank.core.lowrank import optimum
from distil_rank.core.lowrank import Drift, drifted_student, spectrum_from_inputs, spectrum_from_outputs
from distil_rank.core.moments import Moments
from tests.reference_compress import reduced_rank_regression


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    """Correlated rows with a large mean."""
    return draw(n, d, seed=seed) @ draw(d, d, seed=seed + 1) + 5 * draw(d, seed=seed + 2)


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (24, 6)])
def test_both_sides_give_the_optimum(shape):
    W, c, x = draw(*shape, seed=3), draw(shape[0], seed=4), rows(200, shape[1])
    best = optimum(W, c, Moments.of(x))
    for found in (
        spectrum_from_inputs(W, Moments.of(x)),
        spectrum_from_outputs(W, c, Moments.of(x @ W.T + c)),
    ):
        for rank in range(1, min(shape) + 1):
            student = found.student(W, c, rank)
            expected = best.student(rank)
            torch.testing.assert_close(student(x), expected(x), rtol=1e-9, atol=1e-9)
            assert found.fvu(rank) == pytest.approx(float(best.fvu[rank]), abs=1e-12)


def test_full_rank_is_the_teacher_off_the_data_too():
    W, c = draw(24, 6, seed=3), draw(24, seed=4)
    x = rows(50, 6) * torch.tensor([1.0, 1, 1, 0, 0, 0])  # singular covariance
    student = spectrum_from_inputs(W, Moments.of(x)).student(W, c, 6)
    other = draw(20, 6, seed=9)
    torch.testing.assert_close(student(other), other @ W.T + c)


@pytest.mark.parametrize("shape", [(7, 7), (4, 9), (12, 5)])
def test_changed_inputs_equal_reduced_rank_regression(shape):
    W, c, x = draw(*shape, seed=3), draw(shape[0], seed=4), rows(300, shape[1])
    changed = x + 0.5 * draw(300, shape[1], seed=8) @ draw(shape[1], shape[1], seed=9)
    y = x @ W.T + c
    drift = Drift.of(Moments.of(torch.cat([changed, y], 1)), shape[1])
    for rank in range(1, min(shape) + 1):
        student = drifted_student(W, drift, rank, ridge=1e-12)
        best = reduced_rank_regression(changed, y, rank)
        torch.testing.assert_close(student(changed), best, rtol=1e-6, atol=1e-6)
        error = (student(changed) - y).square().sum() / (y - y.mean(0)).square().sum()
        assert drift.fvu(student) == pytest.approx(float(error.detach()), rel=1e-9)


def test_unseen_directions_keep_the_teacher():
    W, c = draw(6, 6, seed=3), draw(6, seed=4)
    x = rows(100, 6)
    x[:, 3:] = 0  # never vary
    changed = x * torch.tensor([0.7, 0.7, 0.7, 1, 1, 1])
    drift = Drift.of(Moments.of(torch.cat([changed, x @ W.T + c], 1)), 6)
    student = drifted_student(W, drift, 6, ridge=1e-9)
    direction = torch.zeros(2, 6, dtype=torch.float64)
    direction[1, 4] = 1.0
    torch.testing.assert_close(student(direction)[1] - student(direction)[0], W[:, 4], rtol=1e-6, atol=1e-6)


def test_metric_is_best_for_the_next_layer():
    """No worse through H than the plain optimum, and equal to the optimum of the composed layer H W."""
    W, c, H, x = draw(10, 10, seed=3), draw(10, seed=4), draw(4, 10, seed=5), rows(300, 10)
    moments = Moments.of(x)
    drift = Drift.none(W, c, moments)
    for rank in (1, 2, 3):
        student = drifted_student(W, drift, rank, ridge=float("inf"), metric=H.T @ H)
        plain = drifted_student(W, drift, rank, ridge=float("inf"))
        y = (x @ W.T + c) @ H.T
        losses = [float((s(x) @ H.T - y).square().sum().detach()) for s in (student, plain)]
        composed = optimum(H @ W, H @ c, moments)
        best = float(composed.fvu[rank]) * float((y - y.mean(0)).square().sum())
        assert losses[0] <= losses[1]
        assert losses[0] == pytest.approx(best, rel=2e-2)


def test_no_metric_and_the_identity_agree():
    W, c, x = draw(6, 9, seed=3), draw(6, seed=4), rows(100, 9)
    drift = Drift.none(W, c, Moments.of(x))
    with_metric = drifted_student(W, drift, 3, ridge=float("inf"), metric=torch.eye(6))
    torch.testing.assert_close(with_metric(x), drifted_student(W, drift, 3, ridge=float("inf"))(x))
