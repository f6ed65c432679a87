"""ESM-2 and its tokens: fair-esm's arithmetic with fused attention, the head where asked for.

    from distil_rank.proteins.checkpoints import load_model
    from distil_rank.proteins.esm2 import tokenise

    model = load_model("nano-256", head=True).model
    (hidden,), logits = model(tokenise(["MKTAYIAKQR", "GAVL"]))  # (2, 12, 256), (2, 12, 33)

Columns: <cls>, residues, <eos>, padding. Architecture: Lin et al. 2023 (Science 379:1123), as in
fair-esm's `ESM2`: pre-norm transformer, rotary positions (Su et al. 2021), exact GELU, "token
dropout" scaling. Left out: the contact head and the attention weights.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

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
_ID_OF_BYTE[list(_LETTERS.encode())] = [TOKENS.index(letter) for letter in _LETTERS]

# ESM-2 was trained with 15 % of the tokens chosen, 80 % of those zeroed: inputs are scaled by the
# rest.
_MASKED_IN_TRAINING = 0.15 * 0.8


def tokenise(sequences: Sequence[str]) -> Tensor:
    """Token ids (n, longest + 2): <cls>, residues (i in column i + 1), <eos>, padding.

    InputError on a letter without a token (`fasta.clean_sequence` leaves none).
    """
    check_sequences(sequences)
    tokens = np.full((len(sequences), max(map(len, sequences), default=0) + 2), PAD, dtype=np.int64)
    for row, sequence in zip(tokens, sequences):
        ids = _ID_OF_BYTE[np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)]
        if (ids < 0).any():
            letter = sequence[int(np.argmax(ids < 0))]
            raise InputError(
                f"letters of {_LETTERS} required, got {letter!r}; clean the sequence first"
            )
        row[0], row[1 : len(ids) + 1], row[len(ids) + 1] = CLS, ids, EOS
    return torch.from_numpy(tokens)


def check_sequences(sequences: Sequence[str]) -> None:
    """InputError for an empty sequence and for a bare string."""
    if isinstance(sequences, str) or not all(sequences):
        shown = repr(sequences)[:60]
        raise InputError(f"a list of sequences of at least one residue required, got {shown}")


class Output(NamedTuple):
    """Hidden states of the layers asked for, each (n, l, width), and logits (n, l, 33)."""

    hidden: list[Tensor]
    logits: Tensor | None


class ESM2(nn.Module):
    """ESM-2: `layers` blocks of `width` features; parameters are named as in fair-esm.

    The linear layers may be of lower precision (`load_model(..., dtype="bfloat16")`): matrix
    products and attention then run in it, while embedding, layer norms and the residual stream stay
    float32.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        token_dropout: bool = True,
        eps: float = 1e-5,
        head: bool = False,
    ) -> None:
        super().__init__()
        self.depth, self.width, self.heads = layers, width, heads
        self.token_dropout, self.eps = token_dropout, eps
        weight = torch.empty(len(TOKENS), width)
        if not weight.is_meta:  # where a normal draw would import torch's compiler, for 1.4 s
            weight.normal_()[PAD] = 0
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=PAD)
        self.layers = nn.ModuleList(Block(width, heads, eps) for _ in range(layers))
        self.emb_layer_norm_after = nn.LayerNorm(width, eps=eps)
        self.lm_head = Head(self.embed_tokens.weight, eps) if head else None

    def depths(self, layers: Sequence[int]) -> list[int]:
        """Layers as numbers from 0 (token embedding) to `depth`; negative ones count from the last.

        InputError for a layer that the model does not have.
        """
        for layer in layers:
            if not -self.depth - 1 <= layer <= self.depth:
                raise InputError(
                    f"layers between {-self.depth - 1} and {self.depth} (the last) required,"
                    f" got {layer}"
                )
        return [layer % (self.depth + 1) for layer in layers]

    def forward(
        self, tokens: Tensor, layers: Sequence[int] = (-1,), logits: bool | Tensor = True
    ) -> Output:
        """Hidden states of `layers` and, of a model with a head, logits for tokens (n, l).

        As in fair-esm, only the last layer has the final layer norm applied. Rows at padding are
        meaningless. `logits` may be a mask (n, l): then they are computed at these k places only,
        (k, 33).
        """
        wanted = self.depths(layers)
        places = logits if isinstance(logits, Tensor) else None
        head = self.lm_head if places is not None or logits else None
        if places is not None and head is None:
            raise InputError("a model with a head required for logits; load it with head=True")
        padding = tokens.eq(PAD)
        visible = ~padding[:, None, None, :] if bool(padding.any()) else None
        x = self._embed(tokens, padding)
        rotation = _rotation(tokens.shape[1], self.width // self.heads, tokens.device)
        kept = {0: x}
        needed = self.depth if head is not None else max(wanted, default=0)
        for depth, block in enumerate(self.layers[:needed], start=1):
            x = block(x, visible, rotation)
            if depth in wanted:
                kept[depth] = x
        if self.depth in wanted:
            kept[self.depth] = self.emb_layer_norm_after(x)
        hidden = [kept[depth] for depth in wanted]
        if head is None:
            return Output(hidden, None)
        if self.depth in wanted:
            last = kept[self.depth] if places is None else kept[self.depth][places]
        else:
            last = self.emb_layer_norm_after(x if places is None else x[places])
        return Output(hidden, head(last))

    def _embed(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Embedded tokens (n, l, width), zero at masks and padding, scaled by the visible share."""
        x = self.embed_tokens(tokens)
        if self.token_dropout:
            masked = tokens.eq(MASK)
            observed = masked.sum(-1).to(x.dtype) / (~padding).sum(-1)
            x = x.masked_fill(masked[..., None], 0.0)
            x = x * ((1 - _MASKED_IN_TRAINING) / (1 - observed))[:, None, None]
        return x.masked_fill(padding[..., None], 0.0)


class Head(nn.Module):
    """Language-model head: logits (..., 33) of hidden states, by the weights of the embedding."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(weight.shape[1], weight.shape[1])
        self.layer_norm = nn.LayerNorm(weight.shape[1], eps=eps)
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x.to(_dtype(self.dense, x)))
        x = x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
        return F.linear(self.layer_norm(x), self.weight) + self.bias


class Block(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=eps)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, visible: Tensor | None, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), visible, rotation)
        h = self.final_layer_norm(x)
        return x + self.fc2(F.gelu(self.fc1(h.to(_dtype(self.fc1, h)))))


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor, visible: Tensor | None, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x.to(_dtype(self.q_proj, x))
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        # angles in the dtype of the weights: under autocast that is float32, as in fair-esm
        cosine, sine = (part.to(x.dtype) for part in rotation)
        q, k = (_rotate(part, cosine, sine).to(v.dtype) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return self.out_proj(_attend(q, k, v, visible).transpose(1, 2).flatten(-2))


def _dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """Dtype of a linear module's weights, whatever form it has; x's own where it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attention (n, heads, l, width / heads) over the visible places (n, 1, 1, l)."""
    if not (v.dtype == torch.bfloat16 and v.requires_grad and v.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    # training in bfloat16 on a CPU: the backward of two plain products is twice as fast
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _rotation(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, 1, head_width / 2) of position * 10000^(-2 j / head_width)."""
    positions = torch.arange(length, device=device).float()
    angle = torch.outer(positions, frequencies(head_width, device))[:, None, :]
    return angle.cos(), angle.sin()


def frequencies(head_width: int, device: torch.device | str = "cpu") -> Tensor:
    """Angles per position (head_width / 2,) by which the features of a head are turned."""
    return 1.0 / 10000 ** (torch.arange(0, head_width, 2, device=device).float() / head_width)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions for x (n, l, heads, head_width): feature j turns with j + head_width / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
