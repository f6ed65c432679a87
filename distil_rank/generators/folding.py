"""Do written proteins fold? Mean pLDDT by ESMFold (Lin et al., Science 379, 2023)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distil_rank.core.errors import InputError, few, hub_errors
from distil_rank.core.records import Record
from distil_rank.generators.quality import mean, shuffled

FOLDED = 50  # proteins of each group, at most
CHUNK = 64  # rows at a time in the attention over pairs: less memory for long proteins


def load_esmfold(name: str, device: torch.device) -> Any:
    """An ESMFold (eval mode) from a folder or the Hugging Face hub, with all of its weights."""
    from transformers import EsmForProteinFolding

    with hub_errors("an ESMFold", f"check {name}"):
        found: Any = EsmForProteinFolding.from_pretrained(name, output_loading_info=True)
    model, info = found
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise InputError(f"all weights of an ESMFold required, got {name} without {few(missing)}")
    model.trunk.set_chunk_size(CHUNK)
    return model.eval().to(device)


def confidence(
    esmfold: Any, generated: Sequence[str], natural: Sequence[str], seed: int = 0
) -> Record:
    """Mean pLDDT, 0 to 100, of written, held-out and shuffled proteins, an interval over each."""
    groups = {"generated": generated, "natural": natural, "shuffled": shuffled(natural, seed)}
    chosen = {name: [s for s in group if s][:FOLDED] for name, group in groups.items()}
    return {
        name: mean(np.array([plddt(esmfold, s) for s in group]))
        for name, group in chosen.items()
        if len(group) > 1
    }


@torch.no_grad()
def plddt(esmfold: Any, sequence: str) -> float:
    """Mean over the atoms of one protein of the predicted local distance difference, 0 to 100."""
    found = esmfold.infer([sequence])
    atoms = found["atom37_atom_exists"]
    return 100 * float((found["plddt"] * atoms).sum() / atoms.sum())
