"""Two-stage retrieval with a nested embedding: shortlist on a prefix, rerank on the whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distil_rank.core.errors import InputError

CHUNK = 65_536  # database rows compared at a time


def truncate(z: Tensor, dim: int, unit: bool = True) -> Tensor:
    """The first `dim` columns of nested embeddings (..., k), divided by their L2 norm after the cut unless unit=False."""
    if not 1 <= dim <= z.shape[-1]:
        raise InputError(f"a dim between 1 and {z.shape[-1]} required, got {dim}")
    return normalize(z[..., :dim], dim=-1) if unit else z[..., :dim]


def two_stage_search(
    queries: Tensor, database: Tensor, dim: int, k: int = 10, shortlist: int = 100
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and database rows (q, k), best first: `shortlist` candidates on `dim` columns, reranked on all.

    queries (q, d) and database (n, d) are nested embeddings; a shortlist of n makes the search exact.
    """
    if queries.shape[-1] != database.shape[-1]:
        raise InputError(
            f"one width required, got queries of {queries.shape[-1]} and a database of {database.shape[-1]}"
        )
    shortlist = min(shortlist, len(database))
    if not 1 <= k <= shortlist:
        raise InputError(f"1 <= k <= shortlist={shortlist} required, got k={k}")
    short = truncate(queries.float(), dim)
    best = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(database), CHUNK):
        found = short @ truncate(database[start : start + CHUNK].float(), dim).T
        among = torch.cat([best, found], 1)
        numbers = torch.arange(start, start + found.shape[1]).expand(len(queries), -1)
        best, at = among.topk(min(shortlist, among.shape[1]))
        rows = torch.cat([rows, numbers], 1).gather(1, at)
    whole = torch.einsum("qd,qsd->qs", normalize(queries.float(), dim=-1), normalize(database[rows].float(), dim=-1))
    similarities, at = whole.topk(k)
    return similarities, rows.gather(1, at)
