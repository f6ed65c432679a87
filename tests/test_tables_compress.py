"""The tables of the compression benchmark say what the record says."""

import pytest

from benchmarks.tables_compress import cells, models, pairs, precision


@pytest.mark.parametrize(
    ("low", "high", "word"), [(-0.2, -0.1, "better"), (0.1, 0.2, "worse"), (-0.1, 0.1, "open")]
)
def test_the_order_of_a_pair_follows_its_interval(low, high, word):
    found = {"log_ratio": (low + high) / 2, "low": low, "high": high}
    verdicts = [
        {
            "ratio": 0.3,
            "first": "budget",
            "second": second,
            "mean_layer_fvu": found,
            "perplexity": found,
        }
        for second in ("uniform", "SVD-LLM")  # the second is not among the pairs that are shown
    ]
    lines = pairs({"models": {"models": {"nano": {"verdicts": verdicts}}}}).splitlines()
    assert len(lines) == 3 and lines[-1].count(word) == 2


def test_every_table_can_wait_for_its_part():
    assert {table({}) for table in (cells, models, pairs, precision)} == {"Not measured yet."}
