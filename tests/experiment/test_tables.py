import pytest

from distil_rank.experiment.tables import beside, remarks, verdict


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.02, "does not beat"),
        (-0.02, -0.01, "beats"),
        (-0.01, 0.01, "cannot be told apart"),
    ],
)
def test_the_verdict_follows_the_interval_over_rows_and_seeds(low, high, words):
    difference = {"value": (low + high) / 2, "low": 1.0, "high": 1.0, "rows_and_seeds": [low, high]}
    sentence = verdict(difference, {"value": 0.2})
    assert words in sentence
    assert ("the optimum's 0.200" in sentence) == (words != "cannot be told apart")


@pytest.mark.parametrize(
    ("distilled", "best", "shown"),
    [
        (1.42e-4, 4.7e-5, "3.02 times the optimum's 4.70e-05"),
        (0.00672, 0.00669, "0.45% above the optimum's 0.00669"),
        (0.99, 1.0, "1.00% below the optimum's 1.00"),
        (1e-12, 1e-15, "above an optimum of 0"),
    ],
)
def test_two_losses_are_compared_where_their_digits_agree(distilled, best, shown):
    assert beside(distilled, best) == shown


def test_a_bracket_is_one_only_where_held_out_rows_are_not_easier():
    experiment = {"verdict": "", "bracket": {"low": 0.1, "high": 0.2}}
    assert "between 0.100" in remarks(experiment)[-1]
    assert "easier" in remarks({"verdict": "", "bracket": {"low": 0.2, "high": 0.1}})[-1]
