"""Proteins as text for a generator: reading, ProtGPT2's format, tokenisers, splits by relatives, and batches.

The format is ProtGPT2's (Ferruz, Schmidt and Hoecker, 2022): the end token, a newline, the residues with a newline
every 60, a newline, the end token. The first end token is read only; the last is predicted, so a model learns to
stop.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.proteins.fasta import ALPHABET, Protein, clean_proteins, read_fasta
from distil_rank.core.randomness import generator

END = "<|endoftext|>"
LINE = 60  # residues a line
POOL = 32  # batches sorted by length together: little padding, and still a random order


def read_sequences(path: str | Path) -> list[str]:
    """Cleaned sequences of a FASTA file (plain or gzip), or of the column `sequence` of CSV, TSV or parquet."""
    path = Path(path)
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if kind in (".csv", ".tsv", ".parquet"):
        proteins = [Protein(f"row {i}", f"row {i}", text) for i, text in enumerate(_column(path, kind), start=1)]
        if not proteins:
            raise InputError(f"at least one protein required, but {path} has no rows; check the file")
    else:
        proteins = list(read_fasta(path))
    return [p.sequence for p in clean_proteins(proteins, lambda line: print(f"note: {line}", file=sys.stderr))]


def _column(path: Path, kind: str) -> list[str]:
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            names, column = table.column_names, lambda: [str(v) for v in table.column("sequence").to_pylist()]
        else:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            rows = csv.DictReader(io.StringIO(raw.decode()), delimiter="\t" if kind == ".tsv" else ",")
            names, column = list(rows.fieldnames or []), lambda: [row["sequence"] or "" for row in rows]
    except (OSError, UnicodeDecodeError, ValueError, EOFError) as error:
        raise InputError(f"a readable {kind[1:]} file required, got {path} ({error}); check the file") from None
    if "sequence" not in names:
        raise InputError(f"a column named `sequence` required in {path}, got {', '.join(names)}; rename one")
    return column()


@dataclass(frozen=True)
class Splits:
    """Sequences without relatives between the three parts (see proteins.splits)."""

    train: list[str]
    validation: list[str]
    test: list[str]
    counts: dict[str, int]  # what was read, what was left out and why

    @property
    def test_sha256(self) -> str:
        """Hash of the test proteins: who evaluates later can prove that they are the same."""
        return hashlib.sha256("\n".join(self.test).encode()).hexdigest()


def prepare(
    sequences: Sequence[str],
    proportion: float = 1.0,
    held_out: float = 0.05,
    seed: int = 0,
    max_residues: int | None = None,
    identity: float = 0.3,
) -> Splits:
    """Training, validation and test proteins, without exact duplicates and without those above `max_residues`.

    `held_out` is the share of validation, and of test; clusters of relatives are never cut. The split is made before
    the share is taken, so validation and test are the same for every `proportion`.
    """
    from distil_rank.proteins.splits import cluster, split

    if not 0 < proportion <= 1:
        raise InputError(f"train-size-prop must be above 0 and at most 1, got {proportion}; 0.1 is a tenth")
    distinct = list(dict.fromkeys(sequences))
    kept = [s for s in distinct if max_residues is None or len(s) <= max_residues]
    if not kept:
        raise InputError(f"proteins of at most {max_residues} residues required, got none; raise --max-residues")
    parts = [[kept[i] for i in part] for part in split(cluster(kept, identity), (held_out, held_out), seed)]
    order = torch.randperm(len(parts[0]), generator=generator(seed, "train-size-prop")).tolist()
    share = sorted(order[: max(1, round(proportion * len(order)))])
    counts = {
        "read": len(sequences),
        "duplicates_removed": len(sequences) - len(distinct),
        "too_long_left_out": len(distinct) - len(kept),
        "train_before_share": len(parts[0]),
    }
    return Splits([parts[0][i] for i in share], parts[1], parts[2], counts)


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

    vocabulary = {token: i for i, token in enumerate([END, "\n", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="X"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def bpe_tokenizer(sequences: Sequence[str], vocabulary: int = 256) -> Any:
    """Byte-pair encoding trained on the residues of `sequences`; tokens never cross a line."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < len(ALPHABET) + 2:
        raise InputError(f"a vocabulary of at least {len(ALPHABET) + 2} required, got {vocabulary}; 256 is small")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=["\n", *ALPHABET], show_progress=False
    )
    tokenizer.train_from_iterator((render(s).replace(END, "") for s in sequences), trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Encoded:
    """Tokenised proteins, one after the other: tokens (sum of lengths,), offsets (n + 1,), residues (n,)."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    residues: NDArray[np.int64]
    end: int  # id of the end token, also used as padding

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Tokens and mask (b, l) of some proteins, padded on the right."""
        rows = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        width = max(len(row) for row in rows)
        tokens = np.full((len(rows), width), self.end, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            mask[i, : len(row)] = True
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Encoded:
        """Some of the proteins, in the order given."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in chosen]
        offsets = np.concatenate([[0], self.lengths[chosen].cumsum()]).astype(np.int64)
        return Encoded(np.concatenate(rows), offsets, self.residues[chosen], self.end)

    def in_order_of_length(self, batch_size: int) -> list[NDArray[np.int64]]:
        """All proteins in batches of similar length, for evaluation."""
        order = np.argsort(self.lengths, kind="stable")
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def encode(sequences: Sequence[str], tokenizer: Any, context: int) -> Encoded:
    """Tokenise proteins for a model that reads at most `context` tokens. InputError when one is longer."""
    ids = tokenizer([render(s) for s in sequences], add_special_tokens=False)["input_ids"]
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    if len(lengths) and lengths.max() > context:
        worst = int(lengths.argmax())
        many = int((lengths > context).sum())
        raise InputError(
            f"at most {context} tokens per protein required, got {many} longer (protein {worst + 1}: "
            f"{lengths[worst]} tokens, "
            f"{len(sequences[worst])} residues); leave them out with --max-residues or use a model with a "
            f"longer context"
        )
    return Encoded(
        np.concatenate([np.asarray(row, dtype=np.int32) for row in ids]) if ids else np.empty(0, np.int32),
        np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        np.array([len(s) for s in sequences], dtype=np.int64),
        int(tokenizer.eos_token_id),
    )


def epoch_batches(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """All proteins once, in random batches of similar length; the last, smaller batch of an epoch is kept."""
    draw = generator(seed, "batches", epoch)
    order = torch.randperm(len(lengths), generator=draw).numpy()
    pool = batch_size * POOL
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        order[start : start + pool] = part[np.argsort(lengths[part], kind="stable")]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]
