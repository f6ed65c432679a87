"""Proteins read, split and tokenized once, in a folder that every training command maps.

    data.json          what was read, how it was split, what was left out and why
    split.json         digests of the proteins kept aside; `--split-by` of another folder takes it
    PART.tokens        tokens one after the other (uint16 or int32): mapped, so that processes on
                       one machine share one copy and a start reads nothing
    PART.index.npy     (2, n) int32: tokens and residues of each protein
    tokenizer.json ... the tokenizer

A protein's part is a function of its sequence (random), of its cluster, or of a list. The share of
the training proteins is taken before they are tokenized; it changes neither validation nor test.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, read_json, write_json
from distil_rank.generators.data import Encoded, encode, layout_of, parse

SCHEMA, SPLIT = "distil-rank/generator-data/1", "distil-rank/generator-split/2"
PARTS = ("train", "validation", "test", "hard")
AT_ONCE = 2048  # proteins tokenized together
IDENTITIES = (0.3, 0.5, 0.7, 0.9)  # tried where none is asked for
PartOf = Callable[[str], str]


def digest(sequence: str, key: str = "") -> str:
    """16 hexadecimal digits that stand for a sequence."""
    return hashlib.blake2b(sequence.encode(), digest_size=8, key=key.encode()).hexdigest()


def chance(sequence: str, purpose: str, seed: int) -> float:
    """A uniform number in [0, 1) that depends on nothing else."""
    return int(digest(sequence, f"{purpose} {seed}"), 16) / 2**64


def by_chance(held_out: float, seed: int) -> PartOf:
    """Test below `held_out`, validation below twice that, whatever else is in the file."""

    def part_of(sequence: str) -> str:
        u = chance(sequence, "split", seed)
        return "test" if u < held_out else "validation" if u < 2 * held_out else "train"

    return part_of


def by_list(parts: Record) -> PartOf:
    """What a split.json says; a protein that it does not list is for training."""
    part = {name: part for part in PARTS[1:] for name in parts.get(part, [])}
    return lambda sequence: part.get(digest(sequence), "train")


def by_cluster(
    sequences: Sequence[str],
    held_out: float,
    identity: float | None,
    seed: int,
    hard_identity: float | None = None,
) -> tuple[PartOf, Record]:
    """No cluster of relatives is cut. Returns the method too, at the lowest identity that works.

    With `hard_identity` a part "hard", of clusters at that lower identity, is kept aside as well.
    """
    from distil_rank.proteins.splits import split

    reason, least = "", max(1, held_out * len(sequences) / 2)
    hard = [] if hard_identity is None else [hard_identity]
    for level in IDENTITIES if identity is None else (identity,):
        levels = [level, level, *hard]
        try:
            found = split(sequences, [held_out] * len(levels), seed, levels)
        except InputError as error:
            reason = str(error)
            continue
        train, *kept = ([digest(sequences[i]) for i in part] for part in found.parts)
        sizes = len(train), *map(len, kept)
        if min(sizes[1:]) >= least and sizes[0] >= max(sizes[1:]):
            method = found.method if hard_identity is None else found.method | {"hard": hard[0]}
            return by_list(dict(zip(PARTS[1:], kept))), method
        reason = f"got {sizes} proteins for training, validation and test"
    raise InputError(
        f"clusters that fill all parts required at {level:g} identity, {reason};"
        " use a higher --identity, or --split-by random"
    )


def write(
    folder: Path,
    sequences: Iterable[str],
    part_of: PartOf,
    tokenizer: Any,
    context: int,
    crop: bool = False,
    share: float = 1.0,
    seed: int = 0,
) -> Record:
    """One pass over cleaned sequences into files; returns what it came to."""
    counts = Counter(dict.fromkeys(("read", "duplicates", "too_long", "left_out_by_share"), 0))
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)
    kept: dict[str, list[str]] = {part: [] for part in PARTS[1:]}
    tests, begun = {part: hashlib.sha256() for part in PARTS[2:]}, set()
    index = {part: array("i") for part in PARTS}  # tokens and residues of each protein
    chosen = _chosen(sequences, part_of, share, seed, counts)
    with ExitStack() as stack:
        files = {p: stack.enter_context((folder / f"{p}.tokens").open("wb")) for p in PARTS}
        while batch := list(islice(chosen, AT_ONCE)):
            encoded = encode([sequence for sequence, _ in batch], tokenizer)
            for i, (sequence, part) in enumerate(batch):
                if part in kept:
                    kept[part].append(digest(sequence))  # longer ones too: kept from training
                row, residues = encoded.row(i), int(encoded.residues[i])
                if len(row) > context:
                    counts["too_long"] += 1
                    if not crop:
                        continue
                    row = row[:context]
                    residues = len(parse(tokenizer.decode(row))[0])
                files[part].write(row.astype(dtype).tobytes())
                index[part].extend((len(row), residues))
                if part in tests:
                    tests[part].update(b"\n" * (part in begun) + sequence.encode())
                    begun.add(part)
    parts = {}
    for part, flat in index.items():
        pairs = np.array(flat, np.int32).reshape(-1, 2).T.copy()
        np.save(folder / f"{part}.index.npy", pairs)
        tokens, residues = pairs.sum(1, dtype=np.int64).tolist()
        parts[part] = {"proteins": len(flat) // 2, "tokens": tokens, "residues": residues}
    write_json(folder / "split.json", {"schema": SPLIT, **kept})
    tokenizer.save_pretrained(folder)
    return {
        "parts": parts,
        **counts,
        "context": context,
        "dtype": dtype.name,
        "end": int(tokenizer.eos_token_id),
        "layout": list(layout_of(tokenizer)),
        **{f"{part}_sha256": found.hexdigest() for part, found in tests.items()},
    }


def _chosen(
    sequences: Iterable[str], part_of: PartOf, share: float, seed: int, counts: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Distinct proteins with their part, without the training proteins outside of the share."""
    seen: set[int] = set()
    for sequence in sequences:
        counts["read"] += 1
        known = len(seen)
        seen.add(int(digest(sequence), 16))
        part = part_of(sequence)
        if len(seen) == known:
            counts["duplicates"] += 1
        elif part == "train" and chance(sequence, "share", seed) >= share:
            counts["left_out_by_share"] += 1
        else:
            yield sequence, part


class Prepared:
    """A folder that `generator prepare` made."""

    def __init__(self, folder: str | Path):
        from transformers import AutoTokenizer

        self.folder = Path(folder)
        self.record = read_json(self.folder / "data.json", SCHEMA)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)

    def part(self, name: str) -> Encoded:
        """Tokens of a part, mapped from the disk."""
        path, counts = self.folder / f"{name}.tokens", self.record["parts"][name]
        dtype = np.dtype(self.record["dtype"])
        if not path.is_file() or path.stat().st_size != counts["tokens"] * dtype.itemsize:
            raise InputError(
                f"{counts['tokens']} tokens required in {path}, got another size; prepare it again"
            )
        whole = np.memmap(path, dtype, "r") if counts["tokens"] else np.empty(0, dtype)
        lengths, residues = np.load(self.folder / f"{name}.index.npy")
        offsets = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
        layout = tuple(self.record["layout"])
        return Encoded(whole, offsets, residues, self.record["end"], layout)

    def training_parts(self, model: Any) -> tuple[Encoded, Encoded]:
        """Training and validation proteins, not empty, that the model can read."""
        self.require(model)
        parts = self.part("train"), self.part("validation")
        if not all(map(len, parts)):
            got = f"{len(parts[0])} and {len(parts[1])}"
            raise InputError(
                f"proteins to train on and to validate with required in {self.folder}, got {got};"
                " prepare more, or with a higher --held-out"
            )
        return parts

    def require(self, model: Any) -> None:
        """InputError where proteins are longer than a model's context."""
        context, most = self.record["context"], model.config.n_positions
        if context > most:
            raise InputError(
                f"proteins of at most {most} tokens required, got up to {context} in {self.folder};"
                f" prepare them with --context {most}"
            )

    def doubts(self, model: str, weights: str | None = None) -> dict[str, str]:
        """Why it is not on record that a model, or one it started from, never saw the test."""
        path = Path(model) / "training.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if not known or weights not in (None, known.get("weights_sha256")):
            return {model: "has no record of its training"}
        nothing = {"hard_sha256": hashlib.sha256().hexdigest()}  # of records without that part
        own, its = ({**nothing, **data} for data in (self.record, known.get("data", {})))
        same = all(own[key] == its.get(key) for key in ("test_sha256", "hard_sha256"))
        found = {} if same else {model: "was trained without other test proteins, not these"}
        start = known.get("started_from")
        return found | (self.doubts(start["name"], start["weights_sha256"]) if start else {})

    def sequences(self, name: str, most: int | None = None) -> list[str]:
        """Residues of a part, or of `most` of its proteins drawn at random."""
        part = self.part(name)
        order = np.random.default_rng([0, 4]).permutation(len(part))[:most]
        rows = (part.row(int(i)).tolist() for i in np.sort(order))
        return [parse(str(self.tokenizer.decode(row)))[0] for row in rows]

    def summary(self) -> Record:
        """What the record of a training says of its data."""
        left = ("schema", "config", "parts", "environment", "end", "layout", "dtype", "seeds")
        counts = {f"n_{part}": found["proteins"] for part, found in self.record["parts"].items()}
        return {k: v for k, v in self.record.items() if k not in left} | counts
