"""All levels of a nested embedding in one call, each ESM-2 run once.

model = NestedESM.from_pretrained("chain/")
levels = model(tokenise(["MKTAYIAKQR", "GAVL"]))  # {"8M": (2, 12, 320), "35M": (2, 12, 480)}
model.encode(["MKTAYIAKQR", "GAVL"], truncate_dim=480)  # (2, 480)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.sources import chain_models
from distil_rank.proteins.esm2 import CLS, EOS, ESM2, PAD, check_sequences
from distil_rank.proteins.fasta import clean_sequence
from distil_rank.proteins.pooling import embed


class NestedESM(nn.Module):
    """A chain and its models, by size. The chain's tensors are no parameters: they stay float64."""

    def __init__(self, chain: NestedChain, models: Mapping[str, ESM2]) -> None:
        super().__init__()
        if list(models) != chain.sizes or any(
            model.width != chain.widths[size] for size, model in models.items()
        ):
            got = ", ".join(f"{size} ({model.width})" for size, model in models.items())
            raise InputError(f"models of {chain.widths} required, got {got}")
        self.chain, self.models = chain, nn.ModuleList(models.values())

    @classmethod
    def from_pretrained(
        cls, name: str | Path, models: Sequence[str] = (), device: torch.device | str = "cpu"
    ) -> NestedESM:
        """A chain (`NestedChain.from_pretrained`) and the models it was fitted on.

        `models` replaces the names that the chain remembers, smallest first.
        """
        chain = NestedChain.from_pretrained(name)
        loaders = chain_models(chain, models).items()
        return cls(chain, {size: loader.load(device).model for size, loader in loaders})

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Nested embedding (n, l, dim) by size of tokens (n, l); each is a view of the largest.

        Zero at <cls>, <eos> and padding: a chain is one of residues.
        """
        raws = {}
        for size, model in zip(self.chain.sizes, self.models):
            (raws[size],) = model(tokens, (-1,), logits=False).hidden
        whole = self.chain.embed(raws)
        special = torch.isin(tokens, torch.tensor([CLS, EOS, PAD], device=tokens.device))
        whole = whole.masked_fill(special[..., None], 0)
        return {size: whole[..., :dim] for size, dim in self.chain.dims.items()}

    def encode(
        self, sequences: Sequence[str], truncate_dim: int | None = None, normalize: bool = False
    ) -> Tensor:
        """Mean nested embedding (n, truncate_dim) of sequences, on the CPU.

        Only the models that `truncate_dim` needs are run. `normalize` divides by the L2 norm after
        the cut.
        """
        check_sequences(sequences)
        cleaned, raws = [clean_sequence(sequence) for sequence in sequences], {}
        for size, model in zip(self.chain.sizes_for(truncate_dim), self.models):
            found = dict(embed(cast(ESM2, model), cleaned))
            vectors = [
                torch.empty(0, self.chain.widths[size]),
                *(found[i][0] for i in range(len(cleaned))),
            ]
            raws[size] = torch.cat(vectors)
        return self.chain.embed(raws, truncate_dim, normalize)
