"""Perplexity of masked residues: how well a model finds what is hidden."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distil_rank.core.intervals import bootstrap_counts, percentile_interval
from distil_rank.core.randomness import generator
from distil_rank.core.records import Metric, interval
from distil_rank.proteins.batching import Window, batches
from distil_rank.proteins.esm2 import ESM2, tokenise
from distil_rank.proteins.masked import logits_at, mask


@torch.no_grad()
def masked_losses(
    logits: Callable[[Tensor, Tensor], Tensor],
    sequences: Sequence[str],
    seed: int = 0,
    longest: int = 1022,
    changed: tuple[float, float] = (1.0, 0.0),
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Summed cross-entropy (nats) of the masked residues of each protein, and their number; (n,).

    `logits` maps tokens (n, l) and the k chosen places to (k, 33), as `partial(logits_at, model)`.
    15 % of the amino acids are masked as in `mask`, by default all by <mask>, none shown; of longer
    proteins the first `longest` residues count. The masks depend on the sequences and the seed
    alone: models are compared on the same residues.
    """
    sums, counts = np.zeros(len(sequences)), np.zeros(len(sequences))
    items = [Window(i, 0, min(len(sequence), longest)) for i, sequence in enumerate(sequences)]
    for number, group in enumerate(batches(items, budget=8192)):
        batch = tokenise([sequences[item.protein][: item.stop] for item in group])
        tokens, chosen = mask(batch, generator(seed, "perplexity", number), changed)
        found = logits(tokens, chosen).float().cpu()
        loss = F.cross_entropy(found, batch[chosen], reduction="none")
        owner = torch.tensor([item.protein for item in group])[chosen.nonzero()[:, 0]].numpy()
        np.add.at(sums, owner, loss.double().numpy())
        np.add.at(counts, owner, 1)
    return sums, counts


def perplexity(model: ESM2, sequences: Sequence[str], seed: int = 0) -> Metric:
    """exp(mean cross-entropy) per masked residue, with a 95 % interval: bootstrap over proteins."""
    sums, counts = masked_losses(partial(logits_at, model), sequences, seed)
    drawn = bootstrap_counts(len(sums), 1000, generator(seed, "bootstrap")).numpy()
    low, high = percentile_interval(np.exp((drawn @ sums) / (drawn @ counts)))
    value = float(np.exp(sums.sum() / counts.sum()))
    count = {"proteins": len(sequences), "residues": int(counts.sum())}
    return interval(value, low, high, False, **count)
