import pytest
import torch

from distil_rank import Moments
from distil_rank.core.intervals import bootstrap_counts
from distil_rank.core.lowrank import optimum
from distil_rank.experiment.fidelity import (
    HIGHER_IS_BETTER,
    cosine_bound,
    floor_curve,
    rank_curves,
    row_errors,
    summarize,
    without_intervals,
)


@pytest.fixture
def outputs(source):
    y = torch.randn(80, 6, generator=source) + 2
    return y, y + 0.3 * torch.randn(80, 6, generator=source)


def test_metrics_are_their_definitions(outputs, source):
    y, p = (t.double() for t in outputs)
    metrics = summarize([row_errors(*outputs)], bootstrap_counts(80, 50, source))
    mean, error = y.mean(0), (p - y).square().sum()
    cosine = torch.cosine_similarity(y, p)
    expected = {
        "fvu": error / (y - mean).square().sum(),
        "relative_mse": error / y.square().sum(),
        "cosine": cosine.mean(),
        "centred_cosine": torch.cosine_similarity(y - mean, p - mean).mean(),
        "worst_1pct_cosine": cosine.min(),  # 1 % of 80 rows is the first
    }
    for name, value in expected.items():
        found = metrics[name]
        assert found["value"] == pytest.approx(float(value))
        assert found["higher_is_better"] == HIGHER_IS_BETTER[name]
        assert found["low"] <= found["value"] <= found["high"] or name == "worst_1pct_cosine"


def test_the_perfect_and_the_constant_student(outputs, source):
    y, _ = outputs
    counts = bootstrap_counts(80, 20, source)
    perfect = summarize([row_errors(y, y)], counts)
    assert perfect["fvu"]["value"] == 0 and perfect["cosine"]["value"] == pytest.approx(1)
    constant = summarize([row_errors(y, y.double().mean(0).expand(80, -1))], counts)
    assert constant["fvu"]["value"] == pytest.approx(1)
    assert constant["centred_cosine"]["value"] == pytest.approx(0)
    assert constant["cosine"]["value"] > 0.8  # what a large mean is worth


def test_pairing_makes_the_difference_far_more_certain_than_its_parts(outputs, source):
    y, p = outputs
    worse = p + 0.001
    counts = bootstrap_counts(80, 400, source)
    metrics = summarize([row_errors(y, worse)], counts, [row_errors(y, p)])
    width = metrics["fvu"]["high"] - metrics["fvu"]["low"]
    difference = metrics["fvu_minus_optimum"]
    assert difference["high"] - difference["low"] < width / 20
    same = summarize([row_errors(y, p)], counts, [row_errors(y, p)])["fvu_minus_optimum"]
    assert same["value"] == same["low"] == same["high"] == 0


def test_seeds_are_averaged_and_listed(outputs, source):
    y, p = outputs
    seeds = [row_errors(y, p), row_errors(y, p + 0.1)]
    metrics = summarize(seeds, bootstrap_counts(80, 50, source), [row_errors(y, p)] * 2)
    for metric in (metrics["fvu"], metrics["fvu_minus_optimum"]):
        assert metric["value"] == pytest.approx(sum(metric["per_seed"]) / 2, abs=1e-15)
        low, high = metric["seeds_interval"]
        assert low < metric["value"] < high
    difference = metrics["fvu_minus_optimum"]
    both, value = difference["rows_and_seeds"], difference["value"]
    for i, end in enumerate(("low", "high")):  # half widths add up as variances do
        parts = (difference[end] - value) ** 2 + (difference["seeds_interval"][i] - value) ** 2
        assert (both[i] - value) ** 2 == pytest.approx(parts)
    assert both[0] < value < both[1]


def test_the_floor_has_no_interval_because_its_bootstrap_is_too_low(source):
    """Drawn again, rows repeat: a rank-3 floor of 12 rows falls by a third on average."""
    y = torch.randn(12, 6, generator=source, dtype=torch.float64)
    again = [y[torch.randint(12, (12,), generator=source)] for _ in range(200)]
    drawn = [float(floor_curve(rows)[3]) for rows in again]
    assert sum(drawn) / len(drawn) < 0.9 * float(floor_curve(y)[3])
    found = without_intervals(summarize([row_errors(y, y + 1)], bootstrap_counts(12, 9, source)))
    assert {"low", "high", "seeds_interval"}.isdisjoint(found["fvu"]) and "value" in found["fvu"]


def problem(n: int = 300, d_in: int = 20, d_out: int = 20):
    g = torch.Generator().manual_seed(2)
    scales = 1 + 3 * torch.rand(n, 1, generator=g, dtype=torch.float64)
    x = torch.randn(n, d_in, generator=g, dtype=torch.float64) * scales + 0.3
    weight = torch.randn(d_out, d_in, generator=g, dtype=torch.float64)
    bias = torch.randn(d_out, generator=g, dtype=torch.float64)
    return x, weight, bias, x @ weight.T + bias


@pytest.mark.parametrize("n_val", [15, 70])
def test_the_curve_at_every_rank_is_the_student_of_that_rank(n_val):
    x, weight, bias, y = problem(100 + n_val, d_out=12)
    x_val, y_val = x[100:], y[100:]
    solution, oracle = (optimum(weight, bias, Moments.of(rows)) for rows in (x[:100], x_val))
    curves = rank_curves(solution, y_val)
    assert {len(curve) for curve in curves.values()} == {13}
    for rank in range(1, 13):
        rows = row_errors(y_val, solution.student(rank)(x_val).detach())
        expected = {
            "train_fvu": row_errors(y[:100], solution.student(rank)(x[:100]).detach()).fvu,
            "fvu": rows.fvu,
            "cosine": float(rows.cosine.mean()),
            "floor_fvu": float(oracle.fvu[rank]),
        }
        found = {name: float(curve[rank]) for name, curve in curves.items()}
        assert found == pytest.approx(expected, abs=1e-12)
        assert found["fvu"] >= found["floor_fvu"] - 1e-12


def test_no_student_passes_the_cosine_bound_and_it_is_nearly_reached():
    x, weight, bias, y = problem()
    for rank in (2, 12):
        bound = cosine_bound(y, rank)
        student = optimum(weight, bias, Moments.of(x)).student(rank)
        optimizer = torch.optim.LBFGS(
            student.parameters(), max_iter=40, line_search_fn="strong_wolfe"
        )

        def closure(student=student, optimizer=optimizer):
            optimizer.zero_grad()
            loss = 1 - torch.cosine_similarity(student(x), y).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        best = 1 - float(closure())
        assert best <= bound + 1e-12
        assert 1 - bound > 0.5 * (1 - best)
    assert abs(cosine_bound(y, 20) - 1) < 1e-12
