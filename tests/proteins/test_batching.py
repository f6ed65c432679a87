from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distil_rank.proteins.batching import MAX_PADDING, batches, windows

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


def padding(grouped):
    """Share of the tokens computed that are padding."""
    computed = sum(batch[0].tokens * len(batch) for batch in grouped)
    return 1 - sum(item.tokens for batch in grouped for item in batch) / computed


@given(length=st.integers(1, 5000), limit=st.integers(8, 1022))
def test_windows_cover_every_residue_with_weights_that_add_up_to_one(length, limit):
    found = windows(7, length, limit)
    total = torch.zeros(length)
    for window in found:
        assert window.protein == 7 and 0 < window.stop - window.start <= limit
        total[window.start : window.stop] += 1.0 if window.blend is None else window.blend
    torch.testing.assert_close(total, torch.ones(length), rtol=0, atol=1e-5)
    assert found[-1].stop == length and all(window.stop < length for window in found[:-1])
    if length <= limit:
        assert len(found) == 1 and found[0].blend is None


@given(length=st.integers(1023, 9000))
def test_neighbouring_windows_share_a_quarter_and_fade_into_each_other(length):
    found = windows(0, length, 1022)
    for before, after in pairwise(found):
        assert before.stop - after.start >= 255
        assert before.blend[-1] < 0.05 and after.blend[0] < 0.05
    assert found[0].blend[0] == 1 and found[-1].blend[-1] == 1


@given(lengths=lengths, budget=st.integers(1, 8192))
def test_batches_hold_every_window_once_within_budget_and_padding(lengths, budget):
    items = [window for i, length in enumerate(lengths) for window in windows(i, length, 1022)]
    grouped = batches(items, budget)
    key = [(item.protein, item.start) for batch in grouped for item in batch]
    assert sorted(key) == [(item.protein, item.start) for item in items]
    assert padding(grouped) <= MAX_PADDING + 1e-9
    for batch in grouped:
        assert len(batch) == 1 or max(item.tokens for item in batch) * len(batch) <= budget


@given(lengths=lengths)
def test_windows_of_one_protein_stay_in_order(lengths):
    items = [window for i, length in enumerate(lengths) for window in windows(i, length, 100)]
    order = [item for batch in batches(items, 500) for item in batch]
    for protein in range(len(lengths)):
        starts = [item.start for item in order if item.protein == protein]
        assert starts == sorted(starts)


def test_equal_lengths_fill_the_budget():
    grouped = batches([w for i in range(100) for w in windows(i, 98, 1022)], 4096)
    assert [len(batch) for batch in grouped] == [40, 40, 20]
    assert padding(grouped) == pytest.approx(0)
