"""Rank allocation: within budget, never below its certificate, best against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.compress import ranks as ranks_module
from distil_rank.compress.ranks import METHODS, Layer, allocate
from distil_rank.core.errors import InputError


def layer(name: str, d_in: int, d_out: int, seed: int, importance: float | None = None) -> Layer:
    eigenvalues = np.sort(np.random.default_rng(seed).exponential(size=min(d_in, d_out)) ** 3)[::-1]
    tails = np.append(np.cumsum(eigenvalues[::-1])[::-1], 0.0)
    return Layer(name, d_in, d_out, tails, importance)


def brute_force(layers: list[Layer], budget: float) -> float:
    """The least loss over every choice of ranks, dense included."""
    choices = [[*range(1, x.limit + 1), None] for x in layers]
    return min(
        sum(x.loss(r) for x, r in zip(layers, ranks))
        for ranks in itertools.product(*choices)
        if sum(x.cost(r) for x, r in zip(layers, ranks)) <= budget
    )


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(2, 14), st.integers(2, 14)), min_size=1, max_size=3),
    ratio=st.floats(0.05, 1.2),
    seed=st.integers(0, 1000),
    method=st.sampled_from(METHODS),
)
def test_allocation_is_within_budget_and_never_below_its_certificate(shapes, ratio, seed, method):
    layers = [layer(f"l{i}", *shape, seed + i) for i, shape in enumerate(shapes)]
    floor = sum(min(x.rank_cost, x.dense_cost) for x in layers)
    budget = max(ratio * sum(x.dense_cost for x in layers), floor)
    found = allocate(layers, budget, method)
    best = brute_force(layers, budget)
    assert found.cost <= budget
    assert all(r is None or 1 <= r <= x.limit for x, r in zip(layers, found.ranks.values()))
    assert found.bound <= best + 1e-12 and best <= found.loss + 1e-12
    if method == "budget":
        assert found.loss <= best + 1e-12


def test_a_search_that_grows_too_wide_keeps_the_better_of_two_choices(monkeypatch):
    shapes = [(64, 64), (64, 256), (256, 64)] * 4
    layers = [layer(f"l{i}", *shape, i) for i, shape in enumerate(shapes)]
    budget = 0.4 * sum(x.dense_cost for x in layers)
    uniform, exact = allocate(layers, budget, "uniform"), allocate(layers, budget)
    monkeypatch.setattr(ranks_module, "WIDEST", 0)
    walked = allocate(layers, budget)
    assert exact.bound <= exact.loss <= walked.loss <= uniform.loss
    assert walked.gap < 0.01


def test_uniform_keeps_equal_fractions():
    layers = [layer(f"l{i}", 128, 128, i) for i in range(4)]
    budget = 0.5 * sum(x.dense_cost for x in layers)
    assert set(allocate(layers, budget, "uniform").ranks.values()) == {32}


def test_importance_moves_ranks():
    layers = [layer("a", 32, 32, 0, importance=1.0), layer("b", 32, 32, 0, importance=100.0)]
    ranks = allocate(layers, 32 * 32).ranks
    assert ranks["b"] is None or ranks["b"] > ranks["a"]


def test_a_full_budget_keeps_every_layer_dense():
    layers = [layer("a", 16, 16, 0), layer("b", 16, 48, 1)]
    for method in METHODS:
        assert set(allocate(layers, sum(x.dense_cost for x in layers), method).ranks.values()) == {
            None
        }


def test_bad_input():
    with pytest.raises(InputError, match="at least"):
        allocate([layer("a", 16, 16, 0)], 10)
    with pytest.raises(InputError, match="method"):
        allocate([layer("a", 16, 16, 0)], 100, "magic")
