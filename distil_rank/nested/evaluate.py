"""R^2 of every stage on held-out proteins, with intervals over proteins."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from distil_rank.core.intervals import bootstrap_counts, percentile_interval
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import Metric, interval
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.rows import Rows, is_held_out

DRAWS = 2000  # bootstrap resamples of the proteins


def held_out_scores(
    chain: NestedChain,
    stores: Mapping[str, Rows],
    fraction: float,
    held_out: Moments,
    seed: int = 0,
) -> dict[str, dict[str, Metric]]:
    """R^2 of each raw embedding from the prefix (`regression`) and with the new block.

    The latter is `reconstruction`. Measured through `embed` and `reconstruct` on the held-out
    proteins, whose moments are `held_out`, in the stage's units; proteins are resampled.
    """
    keys = next(iter(stores.values())).keys
    proteins = [i for i, key in enumerate(keys) if is_held_out(key, fraction)]
    means = dict(zip(chain.sizes, held_out.mean.split(list(chain.widths.values()))))
    sums: dict[str, list[Tensor]] = {size: [] for size in chain.sizes[1:]}
    for i in proteins:
        raws = {size: stores[size].read(i, i + 1) for size in chain.sizes}
        z = chain.embed(raws).double()
        for (start, stop), size, stage in zip(
            pairwise(chain.dims.values()), chain.sizes[1:], chain.stages
        ):
            x, prefix, block = raws[size].double(), z[:, :start], z[:, start:stop]
            rebuilt = (stage.reconstruct(prefix, b) for b in (block[:, :0], block))
            errors = [x - other for other in (means[size], *rebuilt)]
            sums[size].append(torch.stack([(e / stage.scale).square().sum() for e in errors]))
    counts = bootstrap_counts(len(proteins), DRAWS, generator(seed, "held-out proteins"))
    scores = {}
    for size, parts in sums.items():
        by_protein = torch.stack(parts)  # (proteins, 3)
        whole, resampled = by_protein.sum(0), counts @ by_protein
        scores[size] = {
            kind: interval(
                float(1 - whole[k] / whole[0]),
                *percentile_interval(1 - resampled[:, k] / resampled[:, 0]),
                higher_is_better=True,
                n=len(proteins),
            )
            for k, kind in ((1, "regression"), (2, "reconstruction"))
        }
    return scores
