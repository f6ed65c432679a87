"""From sequences to vectors: one per protein or one per residue, without a file.

for index, vectors in embed(model, ["MKTAYIAKQR", "GAVL"], pool="mean"): ...   # vectors (1, 1, d)
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distil_rank.proteins.batching import Window, batches, windows
from distil_rank.proteins.esm2 import ESM2, check_sequences, tokenise


def embed(
    model: ESM2,
    sequences: Sequence[str],
    pool: str = "mean",
    layers: Sequence[int] = (-1,),
    max_length: int = 1022,
    batch_tokens: int = 4096,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, vectors (layers, rows, d) float32 on the CPU), the longest protein first.

    rows is 1 for pool="mean" and "bos", the number of residues for "residues". Sequences longer
    than `max_length` are embedded in windows that are blended (`batching.windows`).
    """
    check_sequences(sequences)
    items = [
        window
        for i, sequence in enumerate(sequences)
        for window in windows(i, len(sequence), max_length)
    ]
    partial: dict[int, Tensor] = {}
    for batch in batches(items, batch_tokens):
        for window, vectors in zip(batch, embed_batch(model, sequences, batch, pool, layers)):
            if window.blend is not None:
                length = len(sequences[window.protein])
                vectors = _blend(partial.pop(window.protein, None), vectors, window, pool, length)
                if window.stop < length:
                    partial[window.protein] = vectors
                    continue
            yield window.protein, vectors


@torch.no_grad()
def embed_batch(
    model: ESM2, sequences: Sequence[str], batch: list[Window], pool: str, layers: Sequence[int]
) -> list[Tensor]:
    """Vectors (layers, rows, d) of each window: residues by their index, never padding."""
    tokens = tokenise([sequences[w.protein][w.start : w.stop] for w in batch])
    hidden = model(tokens.to(model.embed_tokens.weight.device), layers, logits=False).hidden
    if pool == "residues":
        on_cpu = [h.cpu() for h in hidden]
        return [torch.stack([h[i, 1 : w.tokens - 1] for h in on_cpu]) for i, w in enumerate(batch)]
    if pool == "bos":
        return list(torch.stack(hidden)[:, :, 0].cpu().transpose(0, 1).unsqueeze(2))
    rows = []
    for i, window in enumerate(batch):
        residues = [h[i, 1 : window.tokens - 1] for h in hidden]
        if window.blend is None:
            rows.append(torch.stack([r.mean(0, keepdim=True) for r in residues]))
        else:
            weights = (window.blend / window.blend.sum()).to(residues[0])
            rows.append(torch.stack([weights[None] @ r for r in residues]))
    return list(torch.stack(rows).cpu())


def _blend(
    so_far: Tensor | None, vectors: Tensor, window: Window, pool: str, length: int
) -> Tensor:
    """Add a window's share to that of the protein's earlier windows; they add up to 1."""
    assert window.blend is not None
    if pool == "residues":
        whole = (
            vectors.new_zeros(len(vectors), length, vectors.shape[-1]) if so_far is None else so_far
        )
        whole[:, window.start : window.stop] += window.blend[:, None] * vectors
        return whole
    share = window.blend.sum() / length * vectors
    return share if so_far is None else so_far + share
