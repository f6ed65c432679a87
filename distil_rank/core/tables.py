"""Numbers and tables as text: one markdown table, one way to write a number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """An aligned markdown table; the first row is the heading, the first column is text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths)))
        return "| " + " | ".join(aligned) + " |"

    rule = "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths))
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def framed(*lines: str) -> str:
    """Lines in a frame, for a notice nobody should miss."""
    width = max(map(len, lines))
    rule = f"+{'-' * (width + 2)}+"
    return "\n".join([rule, *(f"| {line:<{width}} |" for line in lines), rule])


def number(value: float) -> str:
    """Three significant digits; scientific below 0.0001."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def closeness(value: float) -> str:
    """A number near 1, with as many decimals as its distance to 1 needs: 0.99993, not 1.0000."""
    distance = 1 - abs(value)
    decimals = 4 if distance <= 0 else min(9, max(4, 2 - math.floor(math.log10(distance)) - 1))
    return f"{value:.{decimals}f}"


def with_interval(metric: Mapping[str, Any], spec: str = ".3g") -> str:
    """`value [low, high]`."""
    return f"{metric['value']:{spec}} [{metric['low']:{spec}}, {metric['high']:{spec}}]"
