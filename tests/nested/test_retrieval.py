"""A shortlist of everything is exact search; a short prefix finds most of it."""

import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.nested.retrieval import truncate, two_stage_search
from distil_rank.core.randomness import generator


def vectors():
    draw = generator(0, "retrieval")
    database = torch.randn(500, 32, generator=draw) * torch.logspace(0, -1.5, 32)
    return database[:20] + 0.02 * torch.randn(20, 32, generator=draw), database


def exact(queries, database, k):
    return torch.nn.functional.cosine_similarity(queries[:, None], database, dim=-1).topk(k)


def test_whole_shortlist_is_exact_search(monkeypatch):
    monkeypatch.setattr("distil_rank.nested.retrieval.CHUNK", 64)
    queries, database = vectors()
    values, rows = two_stage_search(queries, database, 8, k=5, shortlist=500)
    best = exact(queries, database, 5)
    torch.testing.assert_close(values, best.values)
    assert torch.equal(rows, best.indices)


def test_prefix_shortlist_finds_the_neighbour_and_reranks_on_everything():
    queries, database = vectors()
    values, rows = two_stage_search(queries, database, 8, k=3, shortlist=50)
    assert (rows[:, 0] == torch.arange(20)).float().mean() == 1
    whole = torch.nn.functional.cosine_similarity(queries[:, None], database[rows], dim=-1)
    torch.testing.assert_close(values, whole)
    assert (values.diff(dim=1) <= 0).all()


def test_truncate():
    z = vectors()[1]
    torch.testing.assert_close(truncate(z, 8).norm(dim=1), torch.ones(500))
    assert torch.equal(truncate(z, 8, unit=False), z[:, :8])


def test_bad_input():
    queries, database = vectors()
    for call in (
        lambda: truncate(database, 33),
        lambda: two_stage_search(queries[:, :8], database, 4),
        lambda: two_stage_search(queries, database, 8, k=20, shortlist=10),
    ):
        with pytest.raises(InputError, match="required"):
            call()
