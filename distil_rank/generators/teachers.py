"""Where the teacher's targets come from: the model itself, or what was kept of it so that repeated runs need no
teacher.

The exact cache keeps all logits in float32 (4 V bytes a token: for small vocabularies); the top-k cache keeps the k
most probable tokens at the training temperature, the mass of the rest and the entropy (6 k + 8 bytes a token).

Asked or kept, the teacher reads a protein at one width, that of its own length and not of its batch: the order in
which attention adds depends on the width, and with the batch's a protein's logits would change in the last bit from
batch to batch. How many proteins are read together changes nothing on one thread of a CPU, so the exact cache gives
the live teacher's losses bit for bit there; a GPU may choose other kernels for other batches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distil_rank.core.errors import InputError
from distil_rank.generators.data import Encoded
from distil_rank.generators.fit import Precision, autocast
from distil_rank.generators.loss import TopTargets, top_targets

WIDTH = 32  # a protein is read with padding to the next multiple


class Live:
    """The teacher, asked at every step."""

    def __init__(self, model: Any, precision: Precision = "fp32"):
        self.model, self.precision = model.eval(), precision

    @torch.no_grad()
    def targets(self, indices: NDArray[np.int64], tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits (b, l, V) for tokens padded on the right; those of padding mean nothing."""
        lengths = mask.sum(1)
        widths = ((lengths + WIDTH - 1) // WIDTH * WIDTH).clamp_max(self.model.config.n_positions)
        found: Tensor | None = None
        for width in widths.unique().tolist():
            rows = (widths == width).nonzero()[:, 0]
            logits = self._read(F.pad(tokens[rows], (0, max(0, width - tokens.shape[1])))[:, :width])
            logits = logits[:, : tokens.shape[1]]
            if len(rows) == len(tokens):
                return logits
            if found is None:
                found = logits.new_zeros(*tokens.shape, logits.shape[-1])
            found[rows, : logits.shape[1]] = logits
        assert found is not None
        return found

    def _read(self, tokens: Tensor) -> Tensor:
        with autocast(tokens.device, self.precision):
            return self.model(input_ids=tokens, use_cache=False).logits


class Cache:
    """Targets of every training protein, computed once, in batches; memory on the processor's side."""

    def __init__(
        self,
        model: Any,
        proteins: Encoded,
        top: int | None = None,
        temperature: float = 2.0,
        precision: Precision = "fp32",
        batch_size: int = 64,
    ):
        vocabulary = model.config.vocab_size
        if top is not None and not 1 <= top <= vocabulary:
            raise InputError(f"a top-k between 1 and the vocabulary of {vocabulary} required, got {top}")
        self.offsets, self.temperature = proteins.offsets, temperature
        rows = int(proteins.offsets[-1])
        self.logits = torch.empty(rows if top is None else 0, vocabulary)
        k = top or 0
        self.ids = torch.empty(rows if k else 0, k, dtype=torch.int32 if vocabulary > 32767 else torch.int16)
        self.probabilities = torch.empty(rows if k else 0, k)
        self.tail, self.entropy = torch.empty(len(self.ids)), torch.empty(len(self.ids))
        live = Live(model, precision)
        device = next(model.parameters()).device
        for batch in proteins.in_order_of_length(batch_size):
            tokens, mask = (x.to(device) for x in proteins.batch(batch))
            logits = live.targets(batch, tokens, mask)
            for row, i in enumerate(batch):
                place = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
                own = logits[row, : place.stop - place.start].float()
                if top is None:
                    self.logits[place] = own.cpu()
                else:
                    kept = top_targets(own, top, temperature)
                    self.ids[place], self.probabilities[place] = (
                        kept.ids.to("cpu", self.ids.dtype),
                        kept.probabilities.cpu(),
                    )
                    self.tail[place], self.entropy[place] = kept.tail.cpu(), kept.entropy.cpu()

    def targets(self, indices: NDArray[np.int64], tokens: Tensor, mask: Tensor) -> Tensor | TopTargets:
        """Logits (b, l, V), or top targets with leading (b, l); padding positions are zero."""
        width = tokens.shape[1]
        places = [slice(int(self.offsets[i]), int(self.offsets[i + 1])) for i in indices]

        def padded(source: Tensor) -> Tensor:
            out = source.new_zeros(len(places), width, *source.shape[1:])
            for row, place in enumerate(places):
                out[row, : place.stop - place.start] = source[place]
            return out.to(tokens.device)

        if len(self.logits):
            return padded(self.logits)
        return TopTargets(padded(self.ids).long(), padded(self.probabilities), padded(self.tail), padded(self.entropy))
