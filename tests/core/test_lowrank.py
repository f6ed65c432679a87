"""The one closed form: every rank, any metric, changed inputs, any teacher; against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank import Moments, truncated_svd
from distil_rank.core.lowrank import (
    Joint,
    floor_fvu,
    leading_eigenpairs,
    optimum,
    optimum_from_outputs,
    refit_bias,
    smallest_rank,
    tails,
)
from tests import reference
from tests.core.rows import KINDS, draw, layer, loss, rows

SHAPES = [(24, 24), (10, 24), (40, 24)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimum_attains_the_tail_of_the_spectrum_at_every_rank(kind, shape):
    x, teacher = rows(kind), layer(*shape)
    y = teacher(x).detach()
    eigenvalues = torch.linalg.svdvals(y - y.mean(0)).square() / len(x)
    variance = float((y - y.mean(0)).square().sum(1).mean())
    best = optimum(teacher.weight, teacher.bias, Moments.of(x))
    assert float(best.tails[0]) == pytest.approx(variance, rel=1e-9)
    for rank in (1, 4, 9):
        floor = float(eigenvalues[rank:].sum())
        tolerance = 1e-9 * max(floor, 1e-6 * variance)
        assert abs(loss(best.student(rank)(x), y) - floor) <= tolerance
        assert float(best.fvu[rank]) == pytest.approx(floor / variance, rel=1e-9, abs=1e-14)
        few = optimum(teacher.weight, teacher.bias, Moments.of(x), rank)
        assert abs(loss(few.student(rank)(x), y) - floor) <= tolerance
        assert float(few.tails[rank]) == pytest.approx(floor, rel=1e-9, abs=1e-13 * variance)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_reduced_rank_regression(kind):
    x, teacher = rows(kind), layer(12)
    student = optimum(teacher.weight, teacher.bias, Moments.of(x)).student(5)
    slow = reference.reduced_rank_regression(x, teacher(x).detach(), 5)
    tolerance = 1e-6 * float(slow.abs().max())
    torch.testing.assert_close(student(x).detach(), slow, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("shape", [*SHAPES, (24, 24, 6)])
@pytest.mark.parametrize("metric", [None, 4])
def test_directions_that_the_rows_leave_open_follow_the_weight(shape, metric):
    """As the limit of a little variance in all directions; and whatever the eigensolver does."""
    teacher, x = layer(*shape[:2]), rows(n=6)
    W = teacher.weight.detach()
    if len(shape) == 3:  # a weight that has few directions itself
        W = W[:, : shape[2]] @ draw(shape[2], 24, seed=1)
    G = None if metric is None else draw(len(W), len(W), seed=metric)
    G = None if G is None else G @ G.T
    moments = Moments.of(x)
    scatter = moments.scatter + 1e-7 * moments.scatter.trace() * torch.eye(24)
    tied = Moments.from_state(moments.state() | {"scatter": scatter})
    turn = torch.linalg.qr(draw(len(W), len(W), seed=2)).Q
    turned = None if G is None else turn @ G @ turn.T
    outputs = Moments.of(x @ W.T)
    for rank in (5, 8, 10):
        A, B, _ = optimum(W, None, moments, rank, G).factors(rank)
        for other in (
            optimum(W, None, tied, rank, G),
            optimum(W, None, moments, None, G),
            *([optimum_from_outputs(W, None, outputs, rank)] if G is None else []),
        ):
            a, b, _ = other.factors(rank)
            torch.testing.assert_close(b @ a, B @ A, rtol=1e-3, atol=1e-3 * float(W.std()))
        a, b, _ = optimum(turn @ W, None, moments, rank, turned).factors(rank)
        torch.testing.assert_close(turn.T @ b @ a, B @ A, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_from_outputs_is_from_inputs(shape):
    x, teacher = rows(n=200), layer(*shape)
    W, c = teacher.weight, teacher.bias
    one = optimum(W, c, Moments.of(x))
    two = optimum_from_outputs(W, c, Moments.of(teacher(x).detach()))
    torch.testing.assert_close(one.fvu, two.fvu, rtol=1e-9, atol=1e-12)
    for rank in range(1, min(shape) + 1):
        torch.testing.assert_close(one.student(rank)(x), two.student(rank)(x), rtol=1e-9, atol=1e-9)


def test_full_rank_is_the_teacher_off_the_data_too():
    x, teacher = rows("constant features"), layer(40)  # singular covariance, tall weight
    student = optimum(teacher.weight, teacher.bias, Moments.of(x)).student(24)
    other = draw(20, 24, seed=9)
    torch.testing.assert_close(student(other), teacher(other))


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_changed_inputs_or_any_teacher_are_reduced_rank_regression(shape, bent):
    """The best affine map of each rank from x' to y, above the floor of all students."""
    x, teacher = rows(n=300), layer(*shape)
    changed = x + 0.5 * draw(300, 24, seed=8) @ draw(24, 24, seed=9)
    y = teacher(x).detach()
    y = torch.tanh(y) if bent else y
    joint = Joint.of(Moments.of(torch.cat([changed, y], 1)), 24)
    best = joint.optimum(torch.zeros(shape[0], 24) if bent else teacher.weight, ridge=1e-12)
    variance = loss(y.mean(0), y)
    for rank in (1, 3, min(shape)):
        student = best.student(rank)
        slow = reference.reduced_rank_regression(changed, y, rank)
        torch.testing.assert_close(student(changed), slow, rtol=1e-6, atol=1e-6)
        error = loss(student(changed), y) / variance
        assert joint.fvu(student) == pytest.approx(error, rel=1e-9)
        assert floor_fvu(joint.outputs, rank) <= error


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(0, 9999))
def test_no_student_of_the_rank_is_below_the_floor(rank, seed):
    x, teacher = draw(40, 9, seed=seed) + 1, layer(11, 9, seed=seed)
    moments = Moments.of(x)
    A, B, bias = optimum(teacher.weight, teacher.bias, moments).factors(rank)
    A, B, bias = (p + 0.01 * draw(*p.shape, seed=seed + i) for i, p in enumerate((A, B, bias)))
    y = teacher(x).detach()
    floor = floor_fvu(Joint.of_layer(teacher.weight, teacher.bias, moments).outputs, rank)
    assert loss(x @ A.T @ B.T + bias, y) >= floor * loss(y.mean(0), y) * (1 - 1e-12)


def test_a_layer_is_the_special_case_of_unchanged_inputs():
    x, teacher = rows(), layer(10)
    moments = Moments.of(x)
    joint = Joint.of_layer(teacher.weight, teacher.bias, moments)
    plain = optimum(teacher.weight, teacher.bias, moments).student(3)
    for metric in (None, torch.eye(10, dtype=torch.float64)):
        student = joint.optimum(teacher.weight, ridge=math.inf, metric=metric).student(3)
        torch.testing.assert_close(student(x), plain(x))
    measured = Joint.of(Moments.of(torch.cat([x, teacher(x).detach()], 1)), 24)
    assert joint.fvu(plain) == pytest.approx(measured.fvu(plain), rel=1e-9)


def test_unseen_directions_keep_the_teacher():
    teacher, x = layer(), rows()
    x[:, 3:] = 0  # never vary
    shrink = torch.ones(24, dtype=torch.float64)
    shrink[:3] = 0.7
    joint = Joint.of(Moments.of(torch.cat([x * shrink, teacher(x).detach()], 1)), 24)
    student = joint.optimum(teacher.weight, ridge=1e-9).student(24)
    step = torch.zeros(2, 24, dtype=torch.float64)
    step[1, 4] = 1.0
    moved = student(step)[1] - student(step)[0]
    torch.testing.assert_close(moved, teacher.weight[:, 4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "n < d"])
def test_a_metric_is_best_for_the_next_layer(kind):
    """No worse through H than the plain optimum, and the optimum of the composed layer H W."""
    teacher, H, x = layer(30), draw(4, 30, seed=5), rows(kind)
    moments, y = Moments.of(x), (teacher(x) @ H.T).detach()
    found = optimum(teacher.weight, teacher.bias, moments, metric=H.T @ H)
    plain = optimum(teacher.weight, teacher.bias, moments)
    composed = optimum(H @ teacher.weight, H @ teacher.bias, moments)
    for rank in (1, 2, 3):
        best = float(composed.tails[rank])
        reached = loss(found.student(rank)(x) @ H.T, y)
        assert reached == pytest.approx(best, rel=2e-2)
        assert float(found.tails[rank]) == pytest.approx(best, rel=2e-2)
        assert reached <= loss(plain.student(rank)(x) @ H.T, y)


def test_limited_and_full_eigendecomposition_agree():
    root = draw(40, 40)
    few, vectors = leading_eigenpairs(root @ root.T, 7)
    many, _ = leading_eigenpairs(root @ root.T, 40)
    torch.testing.assert_close(few, many[:7])
    torch.testing.assert_close(root @ root.T @ vectors, vectors * few)
    torch.testing.assert_close(tails(few, float(many[7:].sum())), tails(many)[:8])


def test_error_of_the_truncated_svd_is_the_tail_of_the_spectrum():
    weight = draw(12, 20)
    for rank in (1, 5, 12):
        A, B = truncated_svd(weight, rank)
        tail = torch.linalg.svdvals(weight)[rank:].square().sum()
        torch.testing.assert_close((weight - B @ A).square().sum(), tail)
        torch.testing.assert_close(A @ A.T, B.T @ B)


def test_a_refitted_bias_removes_the_mean_error_and_never_hurts():
    x, teacher = rows(), layer()
    A, B = truncated_svd(teacher.weight, 3)
    bias = refit_bias(teacher.weight, teacher.bias, A, B, x.mean(0))
    y, found = teacher(x).detach(), x @ A.T @ B.T
    assert loss(found + bias, y) < loss(found + teacher.bias, y)
    torch.testing.assert_close((found + bias).mean(0), y.mean(0))


def test_smallest_rank_counts_what_is_above():
    assert smallest_rank(torch.tensor([1.0, 0.4, 0.09, 0.01]), 0.1) == 2
    assert smallest_rank(torch.tensor([0.0, 0.0]), 0.1) == 1
