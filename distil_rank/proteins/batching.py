"""Which residues go through the model together: windows, and batches of similar length."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

MAX_PADDING = 0.05  # share of padding above which a batch takes no further protein
OVERLAP = 0.25  # share of a window that it shares with the next one, at least


@dataclass(frozen=True)
class Window:
    """Residues [start, stop) of one protein, in one forward pass."""

    protein: int
    start: int
    stop: int
    blend: Tensor | None = None  # weight of each residue (stop - start,): over all windows 1

    @property
    def tokens(self) -> int:
        return self.stop - self.start + 2


def windows(protein: int, length: int, limit: int) -> list[Window]:
    """Cover `length` residues by windows of at most `limit`: the whole protein where it fits.

    Longer proteins get windows of exactly `limit` residues, evenly spread, that overlap by at least
    a quarter. Weights rise linearly over that quarter from each end inside the protein, and are
    normalized: neighbors are cross-faded.
    """
    if length <= limit:
        return [Window(protein, 0, length)]
    overlap = int(limit * OVERLAP)
    count = ceil((length - overlap) / (limit - overlap))
    starts = [round(i * (length - limit) / (count - 1)) for i in range(count)]
    rising = torch.arange(1, limit + 1, dtype=torch.float64).clamp(max=max(overlap, 1))
    total = torch.zeros(length, dtype=torch.float64)
    ramps = []
    for start in starts:
        ramp = rising if start > 0 else rising[-1].expand(limit)
        if start != starts[-1]:
            ramp = torch.minimum(ramp, rising.flip(0))
        total[start : start + limit] += ramp
        ramps.append(ramp)
    spans = [(start, start + limit) for start in starts]
    blends = [(ramp / total[slice(*span)]).float() for span, ramp in zip(spans, ramps)]
    return [Window(protein, *span, blend) for span, blend in zip(spans, blends)]


def batches(items: Sequence[Window], budget: int) -> list[list[Window]]:
    """Group windows, longest first: at most `budget` tokens, at most 5 % of them padding.

    A window longer than the budget goes alone. Windows of one protein stay in order. Deterministic.
    """
    grouped: list[list[Window]] = []
    real = 0
    for item in sorted(items, key=lambda item: -item.tokens):
        batch = grouped[-1] if grouped else []
        padded = batch[0].tokens * (len(batch) + 1) if batch else 0
        if batch and padded <= budget and real + item.tokens >= (1 - MAX_PADDING) * padded:
            batch.append(item)
            real += item.tokens
        else:
            grouped.append([item])
            real = item.tokens
    return grouped
