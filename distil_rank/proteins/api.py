"""Embeddings in one call: `distil_rank.embed`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError
from distil_rank.proteins import pooling
from distil_rank.proteins.checkpoints import load_model
from distil_rank.proteins.fasta import clean_proteins, clean_sequence, read_fasta


def embed(
    proteins: str | Path | Sequence[str],
    model: str,
    pool: str = "mean",
    device: str = "auto",
    layer: int = -1,
    max_length: int = 1022,
) -> Tensor | list[Tensor]:
    """Vectors (n, d) of sequences, or of the proteins of a FASTA file, in order, on the CPU.

    With pool="residues" a list of (l, d). Longer proteins are embedded in overlapping windows.
    `distil-rank embed` writes more proteins than memory holds into an `EmbeddingStore`.

    >>> embed(["MKTAYIAKQR", "GAVL"], model="nano-64", device="cpu").shape
    torch.Size([2, 64])
    """
    if pool not in ("mean", "bos", "residues"):
        raise InputError(f"required pool mean, bos or residues, got {pool}; mean is usual")
    if isinstance(proteins, str | Path):
        cleaned = clean_proteins(read_fasta(proteins), lambda _: None)
        sequences = [protein.sequence for protein in cleaned]
    else:
        sequences = [clean_sequence(sequence) for sequence in proteins]
    network = load_model(model, pick_device(device)).model
    layers = network.depths((layer,))
    found = dict(pooling.embed(network, sequences, pool, layers, max_length))
    vectors = [found[i][0] for i in range(len(sequences))]
    if pool == "residues":
        return vectors
    return torch.cat(vectors) if vectors else torch.empty(0, network.width)
