import pytest

from distil_rank.core.tables import closeness, framed, markdown, number


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5000"),
        (0.998, "0.9980"),
        (0.99993, "0.999930"),
        (0.9999993, "0.99999930"),
        (1.0, "1.0000"),
        (-0.02, "-0.0200"),
    ],
)
def test_a_cosine_shows_its_distance_to_one(value, shown):
    assert closeness(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.20351, "0.204"),
        (1.0, "1.00"),
        (999.4, "999"),
        (1447.81, "1,448"),
        (4.7e-5, "4.70e-05"),
        (0, "0.00"),
    ],
)
def test_a_number_has_three_significant_digits(value, shown):
    assert number(value) == shown


def test_a_table_is_aligned_markdown():
    lines = markdown([["a", "b"], ["xx", "1.5"]]).splitlines()
    assert lines == ["| a  |   b |", "|----|----:|", "| xx | 1.5 |"]
    assert framed("one", "three").splitlines() == [
        "+-------+",
        "| one   |",
        "| three |",
        "+-------+",
    ]
