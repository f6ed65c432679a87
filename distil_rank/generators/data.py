"""Proteins as text for a generator: ProtGPT2's format, tokenizers, tokenized proteins, batches.

The format is ProtGPT2's (Ferruz, Schmidt and Hoecker, 2022): the end token, a newline, the residues
with a newline every 60, a newline, the end token. The first end token is only read; the last one is
predicted, so a model learns to stop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distil_rank.core.randomness import generator
from distil_rank.proteins.fasta import ALPHABET

END = "<|endoftext|>"
LINE = 60  # residues a line
AT_ONCE = 32  # proteins a model reads together where nothing is trained
POOL = 32  # batches sorted by length together: little padding, and still a random order


def render(sequence: str) -> str:
    """A protein in ProtGPT2's format."""
    lines = [sequence[i : i + LINE] for i in range(0, len(sequence), LINE)]
    return "\n".join([END, *lines, END])


def parse(text: str) -> tuple[str, bool]:
    """Residues of a generated text, and whether it ended by itself."""
    body = text.removeprefix(END)
    residues, end, _ = body.partition(END)
    return "".join(residues.split()), bool(end)


def amino_acid_tokenizer() -> Any:
    """One token per residue, newline and end: 27 tokens. A transformers PreTrainedTokenizerFast."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([END, "\n", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="X"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    text = {"bos_token": END, "eos_token": END, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **text)


@dataclass(frozen=True)
class Encoded:
    """Tokenized proteins, one after the other; protein i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: NDArray[Any]  # (sum of lengths,) integers, in memory or mapped from a file
    offsets: NDArray[np.int64]  # (n + 1,)
    residues: NDArray[Any]  # (n,)
    end: int  # id of the end token, also used as padding
    layout: tuple[int, ...]  # ids without residues: end and line break

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.offsets).data)
        digest.update(np.ascontiguousarray(self.tokens).data)
        return digest.hexdigest()

    def row(self, i: int) -> NDArray[np.int64]:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Tokens and mask (b, l) of some proteins, padded on the right."""
        rows = [torch.from_numpy(self.row(int(i))) for i in indices]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.end)
        lengths = torch.tensor([len(row) for row in rows])
        return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Encoded:
        """Some of the proteins, in the order given."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = [self.row(int(i)) for i in chosen]
        return of_rows(rows, self.residues[chosen], self.end, self.layout)

    def in_order_of_length(self) -> list[NDArray[np.int64]]:
        """All proteins in batches of similar length, for evaluation."""
        order = np.argsort(self.lengths, kind="stable")
        return [order[i : i + AT_ONCE] for i in range(0, len(order), AT_ONCE)]


def of_rows(
    rows: Sequence[Any], residues: NDArray[Any], end: int, layout: tuple[int, ...]
) -> Encoded:
    """Proteins from their tokens, one sequence of integers each."""
    tokens = np.concatenate([np.empty(0, np.int64), *rows]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Encoded(tokens, offsets, residues, end, layout)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The proteins of all parts, one part after the other; a single one stays where it lies."""
    parts = [part for part in parts if len(part)] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    rows = [part.row(i) for part in parts for i in range(len(part))]
    residues = np.concatenate([part.residues for part in parts])
    return of_rows(rows, residues, parts[0].end, parts[0].layout)


def encode(sequences: Sequence[str], tokenizer: Any) -> Encoded:
    """Tokenized proteins, of any length."""
    texts = [render(sequence) for sequence in sequences]
    fast = tokenizer.backend_tokenizer.encode_batch_fast
    rows = [encoding.ids for encoding in fast(texts, add_special_tokens=False)]
    residues = np.array([len(s) for s in sequences], dtype=np.int64)
    return of_rows(rows, residues, int(tokenizer.eos_token_id), layout_of(tokenizer))


def layout_of(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that hold no residue: the end and the line break."""
    breaks = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return tuple(sorted({int(tokenizer.eos_token_id), *breaks}))


def epoch_batches(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """All proteins once, in random batches of similar length; the last one may be smaller."""
    draw = generator(seed, "batches", epoch)
    order = torch.randperm(len(lengths), generator=draw).numpy()
    pool = batch_size * POOL
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        order[start : start + pool] = part[np.argsort(lengths[part], kind="stable")]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]
