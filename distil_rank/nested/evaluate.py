"""R^2 of every stage on held-out proteins, with intervals over proteins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distil_rank.nested.chain import NestedChain
from distil_rank.nested.rows import Rows, is_held_out
from distil_rank.core.randomness import generator
from distil_rank.core.records import interval

DRAWS = 2000  # bootstrap resamples of the proteins


def held_out_scores(chain: NestedChain, stores: Mapping[str, Rows], fraction: float, seed: int = 0) -> dict[str, Any]:
    """For each size: R^2 of its raw embedding from the prefix (`regression`) and with the new block (`reconstruction`).

    Measured through `embed` and `reconstruct` on the held-out proteins, in the stage's units, proteins resampled.
    """
    base = next(iter(stores.values()))
    proteins = [i for i, key in enumerate(base.keys) if is_held_out(key, fraction)]
    means = _means(chain, stores, proteins)
    sums: dict[str, list[Tensor]] = {size: [] for size in chain.sizes[1:]}
    for i in proteins:
        raws = {size: stores[size].read(i, i + 1) for size in chain.sizes}
        z = chain.embed(raws).double()
        start = chain.dims[chain.sizes[0]]
        for size, stage in zip(chain.sizes[1:], chain.stages):
            x, prefix, block = raws[size].double(), z[:, :start], z[:, start : start + stage.added]
            without = stage.reconstruct(prefix, block[:, :0])
            errors = [x - means[size], x - without, x - stage.reconstruct(prefix, block)]
            sums[size].append(torch.stack([(e / stage.scale).square().sum() for e in errors]))
            start += stage.added
    random = generator(seed, "held-out proteins")
    draws = [torch.randint(len(proteins), (len(proteins),), generator=random) for _ in range(DRAWS)]
    scores: dict[str, Any] = {}
    for size, parts in sums.items():
        by_protein = torch.stack(parts)  # (proteins, 3)
        resampled = torch.stack([by_protein[draw].sum(0) for draw in draws])
        whole = by_protein.sum(0)
        scores[size] = {}
        for k, name in ((1, "regression"), (2, "reconstruction")):
            r2 = 1 - resampled[:, k] / resampled[:, 0]
            low, high = torch.quantile(r2, torch.tensor([0.025, 0.975]).double()).tolist()
            scores[size][name] = interval(float(1 - whole[k] / whole[0]), low, high, True, n=len(proteins))
    return scores


def _means(chain: NestedChain, stores: Mapping[str, Rows], proteins: list[int]) -> dict[str, Tensor]:
    means = {}
    for size in chain.sizes[1:]:
        total, count = torch.zeros(chain.widths[size], dtype=torch.float64), 0
        for i in proteins:
            x = stores[size].read(i, i + 1)
            total += x.double().sum(0)
            count += len(x)
        means[size] = total / count
    return means
