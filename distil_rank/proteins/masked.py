"""Masked language modeling: which residues are hidden, and what a model says of them."""

import torch
from torch import Tensor

from distil_rank.proteins.esm2 import ESM2, MASK, tokenise
from distil_rank.proteins.fasta import AMINO_ACIDS

CHOSEN = 0.15  # share of the amino acids that are predicted
_IDS = tokenise([AMINO_ACIDS])[0, 1:-1]


def mask(
    batch: Tensor, masks: torch.Generator, changed: tuple[float, float] = (0.8, 0.1)
) -> tuple[Tensor, Tensor]:
    """Masked tokens and the chosen places (bool), both like `batch`.

    15 % of the 20 amino acids (X, B, ... never) are chosen. Of those, a share of changed[0] becomes
    <mask>, changed[1] a random amino acid; the others stay.
    """
    dice, fate = (torch.rand(batch.shape, generator=masks) for _ in range(2))
    other = _IDS[torch.randint(20, batch.shape, generator=masks)]
    chosen = torch.isin(batch, _IDS) & (dice < CHOSEN)
    tokens = torch.where(chosen & (fate < changed[0]), MASK, batch)
    tokens = torch.where(chosen & (fate >= changed[0]) & (fate < sum(changed)), other, tokens)
    return tokens, chosen


def logits_at(model: ESM2, tokens: Tensor, chosen: Tensor) -> Tensor:
    """Logits (k, 33) at the k chosen places of tokens (n, l)."""
    device = model.embed_tokens.weight.device
    logits = model(tokens.to(device), (), chosen.to(device)).logits
    assert logits is not None
    return logits
