import pytest

from distil_rank.experiment.report import verdict


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.02, "does not beat"),
        (-0.02, -0.01, "beats"),
        (-0.01, 0.01, "cannot be told apart"),
    ],
)
def test_the_verdict_follows_the_interval(low, high, words):
    sentence = verdict({"value": (low + high) / 2, "low": low, "high": high}, {"value": 0.2})
    assert words in sentence
    assert ("times the optimum's 0.2000" in sentence) == (words != "cannot be told apart")
