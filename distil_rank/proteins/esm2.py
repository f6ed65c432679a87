"""ESM-2's encoder and its tokens, for embeddings: fair-esm's arithmetic with fused attention and nothing unused.

    from distil_rank.proteins.checkpoints import load_model
    from distil_rank.proteins.esm2 import tokenise

    model = load_model("nano-256").model
    (hidden,) = model(tokenise(["MKTAYIAKQR", "GAVL"]))     # (2, 12, 256): <cls>, residues, <eos>, padding

Architecture: Lin et al. 2023 (Science 379:1123), as in fair-esm's `ESM2`: pre-norm transformer, rotary positions (Su et
al. 2021), exact GELU, "token dropout" scaling. Left out, because embeddings do not need them: the language-model head,
the contact head and the attention weights.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.core.errors import InputError

# fair-esm's "ESM-1b" alphabet, which ESM-2 uses: the id of a token is its place in this list.
TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
CLS, PAD, EOS, MASK = (TOKENS.index(token) for token in ("<cls>", "<pad>", "<eos>", "<mask>"))
_LETTERS = "".join(token for token in TOKENS if len(token) == 1)
_ID_OF_BYTE = np.full(256, -1, dtype=np.int64)
_ID_OF_BYTE[np.frombuffer(_LETTERS.encode(), dtype=np.uint8)] = [TOKENS.index(letter) for letter in _LETTERS]

# ESM-2 was trained with 15 % of the tokens chosen, 80 % of those zeroed: inputs are scaled by what is left.
_MASKED_IN_TRAINING = 0.15 * 0.8


def tokenise(sequences: Sequence[str]) -> Tensor:
    """Token ids (n, longest + 2): <cls>, residues, <eos>, padding on the right. Residue i stands in column i + 1.

    Raises InputError on a letter without a token (`fasta.clean_sequence` leaves none).
    """
    tokens = np.full((len(sequences), max(map(len, sequences)) + 2), PAD, dtype=np.int64)
    for row, sequence in zip(tokens, sequences):
        ids = _ID_OF_BYTE[np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)]
        if (ids < 0).any():
            letter = sequence[int(np.argmax(ids < 0))]
            raise InputError(f"required letters of {_LETTERS}, got {letter!r}; clean the sequence first")
        row[0], row[1 : len(ids) + 1], row[len(ids) + 1] = CLS, ids, EOS
    return torch.from_numpy(tokens)


class ESM2(nn.Module):
    """ESM-2 encoder: `layers` blocks of `width` features; parameters are named as in fair-esm.

    The linear layers may be bfloat16 (`load_model(..., compute="bfloat16")`): matrix products and attention then run in
    bfloat16, while embedding, layer norms and the residual stream stay float32.
    """

    def __init__(self, layers: int, width: int, heads: int, token_dropout: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.width, self.token_dropout = width, token_dropout
        self.embed_tokens = nn.Embedding(len(TOKENS), width, padding_idx=PAD)
        self.layers = nn.ModuleList(_Block(width, heads, eps) for _ in range(layers))
        self.emb_layer_norm_after = nn.LayerNorm(width, eps=eps)
        self.head_width = width // heads

    def depths(self, layers: Sequence[int]) -> list[int]:
        """Layers as numbers from 0 (token embedding) to `len(self.layers)`; negative ones count from the last."""
        last = len(self.layers)
        for layer in layers:
            if not -last - 1 <= layer <= last:
                raise InputError(f"required layers between {-last - 1} and {last} (the last), got {layer}")
        return [layer % (last + 1) for layer in layers]

    def forward(self, tokens: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """Hidden states of `layers`, each (n, l, width) float32, for tokens (n, l) padded with PAD.

        As in fair-esm, only the last layer has the final layer norm applied. Rows at padding are meaningless.
        """
        wanted = self.depths(layers)
        padding = tokens.eq(PAD)
        mask = ~padding[:, None, None, :] if bool(padding.any()) else None
        x = self.embed_tokens(tokens)
        if self.token_dropout:
            masked = tokens.eq(MASK)
            x = x.masked_fill(masked[..., None], 0.0)
            observed = masked.sum(-1).to(x.dtype) / (~padding).sum(-1)
            x = x * (1 - _MASKED_IN_TRAINING) / (1 - observed)[:, None, None]
        x = x.masked_fill(padding[..., None], 0.0)
        rotation = _rotation(tokens.shape[1], self.head_width, tokens.device)
        kept = {0: x}
        for depth, block in enumerate(self.layers[: max(wanted)], start=1):
            x = block(x, mask, rotation)
            if depth in wanted:
                kept[depth] = x
        if len(self.layers) in kept:
            kept[len(self.layers)] = self.emb_layer_norm_after(x)
        return [kept[depth] for depth in wanted]


class _Block(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.self_attn = _Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=eps)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor]) -> Tensor:
        compute = self.fc1.weight.dtype
        x = x + self.self_attn(self.self_attn_layer_norm(x).to(compute), mask, rotation)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x).to(compute))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in (_rotate(q, rotation), _rotate(k, rotation), v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2))


def _rotation(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, 1, head_width / 2) of the angles position * 10000^(-2 j / head_width)."""
    frequency = 1.0 / 10000 ** (torch.arange(0, head_width, 2, device=device).float() / head_width)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency)[:, None, :]
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions for x (n, l, heads, head_width): feature j turns with feature j + head_width / 2."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
