"""pLDDT of generated proteins by ESMFold, where its weights are at hand; otherwise skipped, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil_rank.generators.quality import mean

NAME = "facebook/esmfold_v1"


def mean_plddt(plddt: Tensor, atom_exists: Tensor) -> Tensor:
    """Mean pLDDT (b,) over the atoms that exist: plddt and atom_exists (b, l, 37), in the unit of `plddt`.

    The other atoms of the 37 carry values that mean nothing, and the share of them differs between amino acids.
    """
    exists = atom_exists.to(plddt)
    return (plddt * exists).sum((1, 2)) / exists.sum((1, 2)).clamp_min(1)


def fold(sequences: Sequence[str], longest: int = 400) -> dict[str, Any]:
    """pLDDT (0 to 1) of the proteins up to `longest` residues. Needs the weights in the Hugging Face cache or the
    network."""
    chosen = [s for s in sequences if 0 < len(s) <= longest]
    if not chosen:
        return {"skipped": f"no generated protein of 1 to {longest} residues"}
    try:
        from transformers import AutoTokenizer, EsmForProteinFolding

        tokenizer = AutoTokenizer.from_pretrained(NAME)
        model = EsmForProteinFolding.from_pretrained(NAME).eval()
    except (OSError, ImportError, ValueError) as error:
        return {"skipped": f"ESMFold is not available ({str(error).strip().splitlines()[0][:120]})"}
    values = []
    with torch.no_grad():
        for sequence in chosen:
            out = model(**tokenizer([sequence], return_tensors="pt", add_special_tokens=False))
            values.append(float(mean_plddt(out.plddt, out.atom37_atom_exists)[0]))
    return {**mean(np.array(values), True), "model": NAME}
