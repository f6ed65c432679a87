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
    [(0.20351, "0.2035"), (1.0, "1.0000"), (1447.81, "1447.8"), (5.3e-5, "5.3e-05"), (0, "0.0000")],
)
def test_numbers_of_one_column_compare(value, shown):
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
