import pytest
import torch
from distil_rank.experiment.rank_curve import floor_curve, held_out_curve

from distil_rank import Moments
from distil_rank.core.intervals import bootstrap_counts
from distil_rank.core.lowrank import optimum
from distil_rank.experiment.fidelity import HIGHER_IS_BETTER, row_errors, summarise


@pytest.fixture
def outputs(source):
    y = torch.randn(80, 6, generator=source) + 2
    return y, y + 0.3 * torch.randn(80, 6, generator=source)


def test_metrics_are_their_definitions(outputs, source):
    y, p = (t.double() for t in outputs)
    metrics = summarise([row_errors(*outputs)], bootstrap_counts(80, 50, source))
    mean = y.mean(0)
    assert metrics["fvu"]["value"] == pytest.approx(
        float((p - y).square().sum() / (y - mean).square().sum())
    )
    assert metrics["relative_mse"]["value"] == pytest.approx(
        float((p - y).square().sum() / y.square().sum())
    )
    cosine = torch.cosine_similarity(y, p)
    assert metrics["cosine"]["value"] == pytest.approx(float(cosine.mean()))
    assert metrics["centred_cosine"]["value"] == pytest.approx(
        float(torch.cosine_similarity(y - mean, p - mean).mean())
    )
    assert metrics["worst_1pct_cosine"]["value"] == float(
        cosine.min()
    )  # 1 % of 80 rows is the first
    assert {
        name: metrics[name]["higher_is_better"] for name in HIGHER_IS_BETTER
    } == HIGHER_IS_BETTER
    for name in HIGHER_IS_BETTER:
        assert (
            metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
            or name == "worst_1pct_cosine"
        )


def test_the_perfect_and_the_constant_student(outputs, source):
    y, _ = outputs
    counts = bootstrap_counts(80, 20, source)
    perfect = summarise([row_errors(y, y)], counts)
    assert perfect["fvu"]["value"] == 0 and perfect["cosine"]["value"] == pytest.approx(1)
    constant = summarise([row_errors(y, y.double().mean(0).expand(80, -1))], counts)
    assert constant["fvu"]["value"] == pytest.approx(1)
    assert constant["centred_cosine"]["value"] == pytest.approx(0)
    assert constant["cosine"]["value"] > 0.8  # what a large mean is worth


def test_pairing_makes_the_difference_far_more_certain_than_its_parts(outputs, source):
    y, p = outputs
    worse = p + 0.001
    counts = bootstrap_counts(80, 400, source)
    metrics = summarise([row_errors(y, worse)], counts, [row_errors(y, p)])
    width = metrics["fvu"]["high"] - metrics["fvu"]["low"]
    difference = metrics["fvu_minus_optimum"]
    assert difference["high"] - difference["low"] < width / 20
    same = summarise([row_errors(y, p)], counts, [row_errors(y, p)])["fvu_minus_optimum"]
    assert same["value"] == same["low"] == same["high"] == 0


def test_seeds_are_averaged_and_listed(outputs, source):
    y, p = outputs
    metrics = summarise(
        [row_errors(y, p), row_errors(y, p + 0.1)], bootstrap_counts(80, 50, source)
    )["fvu"]
    assert metrics["value"] == pytest.approx(sum(metrics["per_seed"]) / 2)
    low, high = metrics["seeds_interval"]
    assert low < metrics["value"] < high


@pytest.mark.parametrize("n_val", [15, 70])
def test_the_curve_at_every_rank_is_the_student_of_that_rank(source, n_val):
    x = torch.randn(100 + n_val, 20, generator=source, dtype=torch.float64) + 1
    weight = torch.randn(12, 20, generator=source, dtype=torch.float64)
    bias = torch.randn(12, generator=source, dtype=torch.float64)
    y = x @ weight.T + bias
    solution = optimum(weight, bias, Moments.of(x[:100]))
    fvu, cosine = held_out_curve(solution, y[100:])
    floor = floor_curve(y[100:])
    assert len(fvu) == len(cosine) == 13 and len(floor) == 13
    oracle = optimum(weight, bias, Moments.of(x[100:]))
    for rank in range(1, 13):
        rows = row_errors(y[100:], solution.student(rank)(x[100:]).detach())
        assert float(fvu[rank]) == pytest.approx(rows.fvu, abs=1e-12)
        assert float(cosine[rank]) == pytest.approx(float(rows.cosine.mean()), abs=1e-12)
        assert float(floor[rank]) == pytest.approx(float(oracle.fvu[rank]), abs=1e-12)
        assert float(fvu[rank]) >= float(floor[rank]) - 1e-12
