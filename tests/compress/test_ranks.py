"""Rank allocation: within budget, never below its certificate, best against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.compress import ranks as ranks_module
from distil_rank.compress.ranks import Options, allocate, largest_rank, low_rank
from distil_rank.core.errors import InputError


def layer(name: str, d_in: int, d_out: int, seed: int, weight: float | None = None) -> Options:
    eigenvalues = np.sort(np.random.default_rng(seed).exponential(size=min(d_in, d_out)) ** 3)[::-1]
    tails = np.append(np.cumsum(eigenvalues[::-1])[::-1], 0.0)
    return low_rank(name, d_in, d_out, tails, weight)


def dense_cost(layers: list[Options]) -> float:
    return sum(x.costs[-1] for x in layers)


def brute_force(layers: list[Options], budget: float) -> float:
    """The least loss over every choice of ranks, dense included."""
    choices = itertools.product(*(zip(x.losses, x.costs) for x in layers))
    sums = (map(sum, zip(*choice)) for choice in choices)
    return min(loss for loss, cost in sums if cost <= budget)


def test_options_are_smaller_factors_and_the_dense_layer():
    tails = np.array([8.0, 4, 2, 1, 0])
    found = low_rank("a", 4, 12, tails)
    assert found.costs.tolist() == [16, 32, 48] and found.losses.tolist() == [0.5, 0.25, 0]
    assert found.picks == [({"a": 1}, {}), ({"a": 2}, {}), ({"a": None}, {})]
    assert low_rank("a", 4, 12, tails, 3.0, (1.0, 4.0)).costs.tolist() == [16, 32, 192]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(2, 14), st.integers(2, 14)), min_size=1, max_size=3),
    ratio=st.floats(0.05, 1.2),
    seed=st.integers(0, 1000),
)
def test_allocation_is_the_best_within_budget_and_never_below_its_certificate(shapes, ratio, seed):
    layers = [layer(f"l{i}", *shape, seed + i) for i, shape in enumerate(shapes)]
    budget = max(ratio * dense_cost(layers), sum(x.costs[0] for x in layers))
    found = allocate(layers, budget)
    best = brute_force(layers, budget)
    assert found.cost <= budget
    for (d_in, d_out), rank in zip(shapes, found.ranks.values()):
        assert rank is None or 1 <= rank <= largest_rank(d_in, d_out)
    assert found.bound <= best + 1e-12 and found.loss == pytest.approx(best, abs=1e-12)


def test_a_search_that_grows_too_wide_keeps_the_relaxed_choice(monkeypatch):
    shapes = [(64, 64), (64, 256), (256, 64)] * 4
    layers = [layer(f"l{i}", *shape, i) for i, shape in enumerate(shapes)]
    exact = allocate(layers, 0.4 * dense_cost(layers))
    monkeypatch.setattr(ranks_module, "WIDEST", 0)
    relaxed = allocate(layers, 0.4 * dense_cost(layers))
    assert exact.bound <= exact.loss <= relaxed.loss and relaxed.cost <= relaxed.budget
    assert relaxed.gap < 0.01


def test_weights_move_ranks():
    layers = [layer("a", 32, 32, 0, 1.0), layer("b", 32, 32, 0, 100.0)]
    ranks = allocate(layers, 32 * 32).ranks
    assert ranks["b"] is None or ranks["b"] > ranks["a"]


def test_a_full_budget_keeps_every_layer_dense():
    layers = [layer("a", 16, 16, 0), layer("b", 16, 48, 1)]
    assert set(allocate(layers, dense_cost(layers)).ranks.values()) == {None}


def test_a_budget_below_rank_1_is_refused():
    with pytest.raises(InputError, match="at least"):
        allocate([layer("a", 16, 16, 0)], 10)
