"""The teacher's targets: asked at every step, or kept so that repeated runs need no teacher.

The cache keeps what the logits are made of in float32: the logits of a small vocabulary, the last
states (4 d bytes a token) where they are fewer numbers.

Asked or kept, the teacher reads a protein at one width, that of its own length and not of its
batch: the order in which attention adds depends on the width, and with the batch's width a
protein's logits would change in the last bit from batch to batch. How many proteins are read
together changes nothing on one thread of a CPU, so the cache gives the live teacher's losses
bit for bit there; a GPU may choose other kernels for other batches.
"""

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distil_rank.core.errors import InputError
from distil_rank.generators.data import Encoded
from distil_rank.generators.loss import Hidden
from distil_rank.generators.models import Dtype, autocast

WIDTH = 32  # a protein is read with padding to the next multiple


def read(model: Any, tokens: Tensor, dtype: Dtype = "float32") -> Hidden:
    """Logits (b, l, V) of a small vocabulary; else the last states (b, l, d) and the head."""
    with autocast(tokens.device, dtype):
        if model.config.vocab_size <= model.config.n_embd:
            return Hidden(model(input_ids=tokens, use_cache=False).logits)
        states = model.transformer(input_ids=tokens, use_cache=False).last_hidden_state
        if dtype != "float32":  # as the head itself would read them
            states = states.to(getattr(torch, dtype))
    return Hidden(states, model.lm_head.weight)


class Live:
    """The teacher, asked at every step."""

    def __init__(self, model: Any, dtype: Dtype = "float32"):
        self.model, self.dtype = model.eval(), dtype

    @torch.no_grad()
    def targets(self, indices: NDArray[np.int64], tokens: Tensor, mask: Tensor) -> Hidden:
        """Logits (b, l, V) for tokens padded on the right; those of padding mean nothing."""
        lengths = mask.sum(1)
        widths = ((lengths + WIDTH - 1) // WIDTH * WIDTH).clamp_max(self.model.config.n_positions)
        found: dict[int, Tensor] = {}
        length = tokens.shape[1]
        for width in widths.unique().tolist():
            rows = (widths == width).nonzero()[:, 0]
            padded = F.pad(tokens[rows], (0, max(0, width - length)))[:, :width]
            states, weight = read(self.model, padded, self.dtype)
            states = F.pad(states[:, :length], (0, 0, 0, max(0, length - width)))
            found |= dict(zip(rows.tolist(), states))
        return Hidden(torch.stack([found[row] for row in range(len(tokens))]), weight)


class Cache:
    """Targets of every training protein, computed once; they lie in the processor's memory."""

    def __init__(self, model: Any, proteins: Encoded, dtype: Dtype = "float32"):
        size, width = model.config.vocab_size, model.config.n_embd
        self.offsets, rows = proteins.offsets, int(proteins.offsets[-1])
        needed = 4 * rows * min(size, width)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory / 2:
            raise InputError(
                f"at most half of {memory / 2**30:.1f} GiB of memory required for --teacher-cache,"
                f" got {needed / 2**30:.1f} GiB; use fewer proteins, or none"
            )
        self.weight = model.lm_head.weight.detach() if size > width else None
        self.kept = torch.empty(rows, min(size, width))
        live, device = Live(model, dtype), next(model.parameters()).device
        for batch in proteins.in_order_of_length():
            tokens, mask = (x.to(device) for x in proteins.batch(batch))
            for i, row in zip(batch, live.targets(batch, tokens, mask).states):
                place = self._place(i)
                self.kept[place] = row[: place.stop - place.start].float().cpu()

    def _place(self, protein: int) -> slice:
        return slice(int(self.offsets[protein]), int(self.offsets[protein + 1]))

    def targets(self, indices: NDArray[np.int64], tokens: Tensor, mask: Tensor) -> Hidden:
        """Logits (b, l, V), or last states with the head; padding positions are zero."""
        found = self.kept.new_zeros(*tokens.shape, self.kept.shape[-1])
        for row, place in enumerate(map(self._place, indices)):
            found[row, : place.stop - place.start] = self.kept[place]
        return Hidden(found.to(tokens.device), self.weight)


Teacher = Live | Cache
