"""Proteins as text for a generator: reading, ProtGPT2's format, tokenizers, splits, batches.

The format is ProtGPT2's (Ferruz, Schmidt and Hoecker, 2022): the end token, a newline, the residues
with a newline every 60, a newline, the end token. The first end token is only read; the last one is
predicted, so a model learns to stop.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distil_rank.core.errors import InputError, above, at_least, at_most
from distil_rank.core.randomness import generator
from distil_rank.core.records import Record, read_json, write_json
from distil_rank.proteins.fasta import ALPHABET, Protein, clean_proteins, read_fasta

SPLIT = "distil-rank/generator-split/1"
END = "<|endoftext|>"
LINE = 60  # residues a line
POOL = 32  # batches sorted by length together: little padding, and still a random order


def read_sequences(path: str | Path) -> list[str]:
    """Cleaned sequences of FASTA, or of the column `sequence` of CSV, TSV or parquet; .gz too."""
    path = Path(path)
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if kind in (".csv", ".tsv", ".parquet"):
        rows = enumerate(_column(path, kind), start=1)
        proteins = [Protein(f"row {i}", f"row {i}", text) for i, text in rows]
        if not proteins:
            raise InputError(f"at least one protein required, {path} has no rows; check the file")
    else:
        proteins = list(read_fasta(path))
    cleaned = clean_proteins(proteins, lambda line: print(f"note: {line}", file=sys.stderr))
    return [protein.sequence for protein in cleaned]


def _column(path: Path, kind: str) -> list[str]:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    text = pyarrow.csv.ConvertOptions(column_types={"sequence": pyarrow.string()})
    parse = pyarrow.csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",")
    try:
        if kind == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=text)
    except (OSError, ValueError) as error:
        raise InputError(f"a readable {kind[1:]} file required, got {path}: {error}") from None
    if "sequence" not in table.column_names:
        names = ", ".join(table.column_names)
        raise InputError(f"a column named `sequence` required in {path}, got {names}; rename one")
    return [str(value or "") for value in table.column("sequence").to_pylist()]


@dataclass(frozen=True)
class Splits:
    """Sequences without relatives between the three parts (see proteins.splits)."""

    train: list[str]
    validation: list[str]
    test: list[str]
    counts: dict[str, int]  # what was read, what was left out and why
    made: Record  # how: method, identity, shares, seed, longest protein, hash of what was split

    @property
    def test_sha256(self) -> str:
        """Hash of the test proteins: who evaluates later can prove that they are the same."""
        return _sha256("\n".join(self.test))


def check_shares(proportion: float, held_out: float) -> None:
    """InputError unless some proteins are left for each part."""
    above(0, train_size_prop=proportion, held_out=held_out)
    at_most(1, train_size_prop=proportion)
    at_most(0.49, held_out=held_out)  # for validation, and as many for test


def prepare(
    sequences: Sequence[str],
    proportion: float = 1.0,
    held_out: float = 0.1,
    seed: int = 0,
    max_length: int | None = None,
    identity: float = 0.3,
) -> Splits:
    """Training, validation and test proteins: no duplicates, none longer than `max_length`.

    `held_out` is the share of validation, and of test; clusters of relatives are never cut. The
    split is made before the share is taken: validation and test are equal for every `proportion`.
    """
    from distil_rank.proteins.splits import split

    check_shares(proportion, held_out)

    def parts(kept: list[str]) -> list[list[str]]:
        drawn = split(kept, (held_out, held_out), seed, identity)
        made.update(drawn.method)
        return [[kept[i] for i in part] for part in drawn.parts]

    made: Record = {
        "identity": identity,
        "held_out": held_out,
        "seed": seed,
        "max_length": max_length,
        "train_size_prop": proportion,
        "sequences_sha256": _sha256("\n".join(sequences)),
    }
    return _splits(sequences, made, parts)


def save_split(folder: str | Path, splits: Splits) -> None:
    """Write `split.json`: how the split was made, and the SHA-256 of every protein held out."""
    parts = {"validation": splits.validation, "test": splits.test}
    held_out = {name: list(map(_sha256, part)) for name, part in parts.items()}
    write_json(Path(folder) / "split.json", {"schema": SPLIT, "made": splits.made} | held_out)


def load_split(folder: str | Path, sequences: Sequence[str]) -> Splits:
    """The split that the training in `folder` was made with; `sequences` are all that it read.

    Nothing is split anew, so no flag, seed or installed program can move a protein that was
    trained on into the test. InputError where the sequences are others.
    """
    path = Path(folder) / "split.json"
    record = read_json(path, SPLIT)
    if _sha256("\n".join(sequences)) != record["made"]["sequences_sha256"]:
        raise InputError(
            f"the proteins that {path} was made of required, got others ({len(sequences)}); "
            "give the file that the model was trained on"
        )
    part_of = {digest: part for part in ("validation", "test") for digest in record[part]}

    def parts(kept: list[str]) -> list[list[str]]:
        names = [part_of.get(_sha256(sequence), "train") for sequence in kept]
        wanted = ("train", "validation", "test")
        return [[s for s, name in zip(kept, names) if name == part] for part in wanted]

    return _splits(sequences, record["made"], parts)


def _splits(
    sequences: Sequence[str], made: Record, parts: Callable[[list[str]], list[list[str]]]
) -> Splits:
    distinct = list(dict.fromkeys(sequences))
    longest = made["max_length"]
    kept = [s for s in distinct if longest is None or len(s) <= longest]
    if not kept:
        raise InputError(f"proteins up to --max-length {longest} required, got none; raise it")
    train, validation, test = parts(kept)
    order = torch.randperm(len(train), generator=generator(made["seed"], "train-size-prop"))
    share = order[: max(1, round(made["train_size_prop"] * len(order)))].sort().values.tolist()
    counts = {
        "read": len(sequences),
        "duplicates_removed": len(sequences) - len(distinct),
        "too_long_left_out": len(distinct) - len(kept),
        "train_before_share": len(train),
    }
    return Splits([train[i] for i in share], validation, test, counts, made)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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

    at_least(len(ALPHABET) + 2, vocabulary=vocabulary)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=["\n", *ALPHABET],
        show_progress=False,
    )
    tokenizer.train_from_iterator((render(s).replace(END, "") for s in sequences), trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    text = {"bos_token": END, "eos_token": END, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **text)


@dataclass(frozen=True)
class Encoded:
    """Tokenized proteins, one after the other; protein i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: NDArray[np.int32]  # (sum of lengths,)
    offsets: NDArray[np.int64]  # (n + 1,)
    residues: NDArray[np.int64]  # (n,)
    end: int  # id of the end token, also used as padding

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Tokens and mask (b, l) of some proteins, padded on the right."""
        rows = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        tokens = pad_sequence(
            [torch.from_numpy(row).long() for row in rows], batch_first=True, padding_value=self.end
        )
        lengths = torch.tensor([len(row) for row in rows])
        return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]

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
    """Tokenize proteins for a model that reads at most `context` tokens; InputError on longer."""
    ids = tokenizer([render(s) for s in sequences], add_special_tokens=False)["input_ids"]
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    if len(lengths) and lengths.max() > context:
        worst = int(lengths.argmax())
        longer = int((lengths > context).sum())
        raise InputError(
            f"at most {context} tokens per protein required, got {longer} longer "
            f"(protein {worst + 1}: {lengths[worst]} tokens, {len(sequences[worst])} residues); "
            "leave them out with --max-length or use a model with a longer context"
        )
    return Encoded(
        np.array([token for row in ids for token in row], dtype=np.int32),
        np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        np.array([len(s) for s in sequences], dtype=np.int64),
        int(tokenizer.eos_token_id),
    )


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
