"""Masked language modelling with fair-esm's own ESM2: fresh models, masks, logits, held-out perplexity, checkpoints.

Training and its command are in `pretrain`; embedding needs none of this (`esm2`).
"""

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distil_rank.proteins.batching import batches, windows
from distil_rank.proteins.esm2 import MASK, tokenise
from distil_rank.proteins.fasta import AMINO_ACIDS
from distil_rank.core.randomness import generator
from distil_rank.core.records import interval
from distil_rank.core.intervals import bootstrap_counts, percentile_interval

if TYPE_CHECKING:
    from esm.model.esm2 import ESM2

CHOSEN = 0.15  # share of the amino acids that are predicted
_IDS = tokenise([AMINO_ACIDS])[0, 1:-1]


def new_model(layers: int, width: int, heads: int, seed: int) -> "ESM2":
    """fair-esm's ESM2 with matrices drawn from N(0, 1 / (4 width)), biases 0; the global generator is left as it was."""
    from esm.model.esm2 import ESM2

    with torch.random.fork_rng(devices=[]):
        model = ESM2(layers, width, heads)
    weights = generator(seed, "weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5 * width**-0.5, generator=weights)
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def look_at_neighbours(model: "ESM2") -> None:
    """Start a fresh model where the statistics of neighbours are one linear map away.

    Every branch ends in zeros, so a layer adds nothing until it has learned to. All heads of a layer but the last begin by
    attending to one relative position each: over the model -1, 1, -2, 2, ... up to 12 away, then again. With constant
    queries and keys (their biases), rotary attention depends on the offset j - i alone:
    score = A sum_f cos(theta_f (j - i - offset)), A such that the positions next to the offset get e^-2.5 of its weight;
    heads of fewer than 16 features see more than one such place.
    """
    offsets = cycle(sign * distance for distance in range(1, 13) for sign in (-1, 1))
    with torch.no_grad():
        for layer in model.layers:
            attention = layer.self_attn
            layer.fc2.weight.zero_()
            attention.out_proj.weight.zero_()
            theta = attention.rot_emb.inv_freq
            length = (2.5 / (1 - theta.cos()).sum() * attention.head_dim**0.5).sqrt()
            query, key = (p.bias.view(attention.num_heads, 2, -1) for p in (attention.q_proj, attention.k_proj))
            for head, offset in zip(range(attention.num_heads - 1), offsets):
                key[head, 0] = length
                query[head] = length * torch.stack([(offset * theta).cos(), (offset * theta).sin()])


def mask(batch: Tensor, masks: torch.Generator, changed: tuple[float, float] = (0.8, 0.1)) -> tuple[Tensor, Tensor]:
    """Masked tokens and the chosen positions (bool), both like `batch`: 15 % of the 20 amino acids (X, B, ... never).

    Of those, a share of changed[0] becomes <mask>, changed[1] a random amino acid; the others stay.
    """
    dice, fate = (torch.rand(batch.shape, generator=masks) for _ in range(2))
    other = _IDS[torch.randint(20, batch.shape, generator=masks)]
    chosen = torch.isin(batch, _IDS) & (dice < CHOSEN)
    tokens = torch.where(chosen & (fate < changed[0]), MASK, batch)
    tokens = torch.where(chosen & (fate >= changed[0]) & (fate < sum(changed)), other, tokens)
    return tokens, chosen


def logits_at(model: "ESM2", tokens: Tensor, chosen: Tensor) -> Tensor:
    """model(tokens)["logits"][chosen] (k, 33): fused attention and GELU, and the head only where it is asked for."""
    padding = tokens.eq(model.padding_idx)
    x = model.embed_tokens(tokens).masked_fill((tokens == model.mask_idx).unsqueeze(-1), 0.0)
    observed = (tokens == model.mask_idx).sum(-1) / (~padding).sum(-1)
    x = x * ((1 - 0.15 * 0.8) / (1 - observed) * ~padding.T).T.unsqueeze(-1)
    visible = ~padding[:, None, None, :] if padding.any() else None
    for layer in model.layers:
        attention = layer.self_attn
        h = layer.self_attn_layer_norm(x)
        q, k, v = (
            project(h).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (r.unflatten(0, q.shape[:2]) for r in attention.rot_emb(q.flatten(0, 1), k.flatten(0, 1)))
        h = _attend(q.to(v.dtype), k.to(v.dtype), v, visible)
        x = x + attention.out_proj(h.transpose(1, 2).flatten(2))
        x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    return model.lm_head(model.emb_layer_norm_after(x[chosen]))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attention (n, heads, l, d / heads); in bfloat16 two plain products, whose backward is twice as fast on CPU."""
    if v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


@torch.no_grad()
def masked_losses(
    logits: Callable[[Tensor, Tensor], Tensor],
    sequences: Sequence[str],
    seed: int = 0,
    longest: int = 1022,
    changed: tuple[float, float] = (1.0, 0.0),
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Summed cross-entropy (nats) of the masked residues of each protein, and their number; both (n,).

    `logits` maps tokens (n, l) and the k chosen places to (k, 33), as `partial(logits_at, model)` does.
    15 % of the amino acids are masked as in `mask`, by default all by <mask>, none shown; of longer proteins the first
    `longest` residues count. The masks depend on the sequences and the seed alone: models are compared on the same residues.
    """
    sums, counts = np.zeros(len(sequences)), np.zeros(len(sequences))
    items = [window for i, s in enumerate(sequences) for window in windows(i, min(len(s), longest), longest)]
    for number, group in enumerate(batches(items, budget=8192)):
        batch = tokenise([sequences[item.protein][: item.stop] for item in group])
        tokens, chosen = mask(batch, generator(seed, "perplexity", number), changed)
        loss = F.cross_entropy(logits(tokens, chosen).float(), batch[chosen], reduction="none")
        owner = torch.tensor([item.protein for item in group])[chosen.nonzero()[:, 0]].numpy()
        np.add.at(sums, owner, loss.double().numpy())
        np.add.at(counts, owner, 1)
    return sums, counts


def perplexity(model: "ESM2", sequences: Sequence[str], seed: int = 0) -> dict:
    """exp(mean cross-entropy) per masked residue (`masked_losses`) with a 95 % interval: bootstrap over proteins."""
    sums, counts = masked_losses(partial(logits_at, model), sequences, seed)
    drawn = bootstrap_counts(len(sums), 1000, generator(seed, "bootstrap")).numpy()
    low, high = percentile_interval(np.exp((drawn @ sums) / (drawn @ counts)))
    value = float(np.exp(sums.sum() / counts.sum()))
    return interval(value, low, high, False, proteins=len(sequences), residues=int(counts.sum()))


def save_checkpoint(model: "ESM2", path: Path) -> None:
    """float16 weights in the format of fair-esm's ESM-2 checkpoints; loads with weights_only=True and Namespace allowed.

    Rotary frequencies stay float32: rounding them would turn far residues by a wrong angle.
    """
    described = argparse.Namespace(
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=model.token_dropout,
    )
    state = {
        f"encoder.{'' if name.startswith('lm_head') else 'sentence_encoder.'}{name}": value
        if name.endswith("inv_freq")
        else value.half()
        for name, value in model.state_dict().items()
        if not name.startswith("contact_head")
    }
    write_torch(path, {"cfg": {"model": described}, "model": state})


def load_checkpoint(path: Path) -> "ESM2":
    """fair-esm's ESM2, language-model head included, from a checkpoint in its format, by fair-esm's own code."""
    import esm

    with torch.serialization.safe_globals([argparse.Namespace]), torch.random.fork_rng(devices=[]):
        content = torch.load(path, map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that contact regression is missing
            return esm.pretrained.load_model_and_alphabet_core("esm2", content)[0].eval()


def write_torch(path: Path, content: object) -> None:
    """torch.save, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
