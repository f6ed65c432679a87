"""FASTA in and out: plain or gzip, in order, streaming; odd ids are data.

What happens to a letter on its way to a model (`clean_sequence`; the alphabet is ESM-2's):

| letters | what happens |
|---|---|
| the 20 amino acids, and X B U Z O | kept: each has a token of its own |
| lower case | upper case (soft masking is not residue information) |
| white space, one final `*` | removed: layout and the stop codon |
| gaps `-` and `.` | removed, counted and reported: they are alignment columns, not residues |
| J (leucine or isoleucine), `*` inside | X, counted and reported: ESM-2 has no token for them |
| anything else (digits, punctuation, letters with accents) | an error that names the proteins |
| nothing left | an error that names the proteins |
"""

import gzip
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from distil_rank.core.errors import InputError, few
from distil_rank.core.records import atomic

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
ALPHABET = AMINO_ACIDS + "XBUZO"
_FOREIGN = re.compile(f"[^{ALPHABET}]")
_CHANGES = (  # what is reported, letters, what stands for them
    ("gaps removed", re.compile("[-.]"), ""),
    ("J or inner * read as X", re.compile("[J*]"), "X"),
)
_REMEDY = "give a FASTA file (lines `>id description`, then the sequence), plain or gzip"


@dataclass(frozen=True)
class Protein:
    """One FASTA record: `id`, the first word of `header`, may be empty, repeated, or a path."""

    id: str
    header: str
    sequence: str


def read_fasta(path: str | Path) -> Iterator[Protein]:
    """Records of a FASTA file, plain or gzip, in file order and as written (nothing cleaned).

    `-` is standard input; that and pipes are kept in a temporary file, to be read again. A byte
    order mark and every kind of line end are understood. Streaming, without an index file; what is
    no FASTA raises InputError where it shows, at the end in a truncated gzip: run through a file
    once before the work starts.
    """
    path = Path(path)
    if str(path) == "-" or path.is_fifo():
        path = Path(_kept(str(path)).name)
    if not path.is_file():
        found = "a folder or special file" if path.exists() else "nothing there"
        raise InputError(f"required a FASTA file at {path}, got {found}; {_REMEDY}")
    return _records(path)


@cache
def _kept(pipe: str) -> Any:
    """What came through a pipe, which can be read once, in a file that ends with the process."""
    with sys.stdin.buffer if pipe == "-" else open(pipe, "rb") as source:
        file = tempfile.NamedTemporaryFile(suffix=".fasta")  # noqa: SIM115
        shutil.copyfileobj(source, file)
        file.flush()
    return file


def _records(path: Path) -> Iterator[Protein]:
    header: str | None = None
    lines: list[str] = []
    try:
        with path.open("rb") as probe:
            opened: Any = gzip.open if probe.read(2) == b"\x1f\x8b" else open
        with opened(path, "rt", encoding="utf-8-sig") as text:  # every line end is \n
            for line in text:
                if "\0" in line:
                    raise InputError(f"required a FASTA text, but {path} holds binary data")
                if line.startswith(">"):
                    if header is not None:
                        yield _record(header, lines)
                    header, lines = line[1:].rstrip("\n"), []
                elif header is not None:
                    lines.append("".join(line.split()))
                elif line.strip():
                    got = f"but {path} does not begin with '>'"
                    raise InputError(f"required a FASTA file, {got}; {_REMEDY}")
    except UnicodeDecodeError as error:
        raise InputError(f"required a FASTA file in UTF-8, got {path} ({error})") from error
    except (EOFError, OSError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(
            f"required a whole and readable FASTA file, got {path} ({reason}); copy it again"
        ) from error
    if header is None:
        raise InputError(f"required at least one protein, but {path} is empty; {_REMEDY}")
    yield _record(header, lines)


def _record(header: str, lines: list[str]) -> Protein:
    return Protein(re.split(r"\s", header, maxsplit=1)[0], header, "".join(lines))


def clean_sequence(sequence: str) -> str:
    """The residues a model sees, by the table above; InputError where none are left."""
    (protein,) = clean_proteins([Protein(sequence[:20], "", sequence)], lambda _: None)
    return protein.sequence


def clean_proteins(proteins: Iterable[Protein], warn: Callable[[str], None]) -> Iterator[Protein]:
    """The proteins with cleaned sequences, streaming.

    When all have passed, `warn` gets one line per kind of change with counts and ids, and empty
    sequences or meaningless letters raise InputError naming the ids: run through a file once before
    the work starts.
    """
    changes: Counter[str] = Counter()
    changed: dict[str, list[str]] = {}
    foreign: list[str] = []
    empty: list[str] = []
    for position, protein in enumerate(proteins, start=1):
        name = protein.id or f"(record {position}, no id)"
        sequence = "".join(protein.sequence.split()).upper().removesuffix("*")
        for kind, letters, instead in _CHANGES:
            sequence, count = letters.subn(instead, sequence)
            if count:
                changes[kind] += count
                changed.setdefault(kind, []).append(name)
        if unknown := set(_FOREIGN.findall(sequence)):
            foreign.append(f"{name} ({''.join(sorted(unknown))})")
        elif not sequence:
            empty.append(name)
        yield replace(protein, sequence=sequence)
    if foreign:
        got = f"{_proteins(foreign)}; correct or remove them"
        raise InputError(f"required letters of {ALPHABET} (or J * - .), got {got}")
    if empty:
        got = f"none in {_proteins(empty)}; remove them"
        raise InputError(f"required at least one residue per protein, got {got}")
    for kind, names in changed.items():
        warn(f"{kind}: {changes[kind]} in {_proteins(names)}")


def _proteins(names: list[str]) -> str:
    return f"{len(names)} protein{'s' if len(names) > 1 else ''}: {few(names)}"


def write_fasta(path: str | Path, proteins: Iterable[Protein], width: int = 60) -> None:
    """Write FASTA, gzip where the name ends in .gz: equal records, equal bytes (no time stamp)."""
    zipped = Path(path).suffix == ".gz"
    with (
        atomic(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if zipped else nullcontext(raw) as file,
    ):
        for protein in proteins:
            sequence = protein.sequence
            if "\n" in protein.header or not sequence.isascii():
                got = repr(protein.header[:60])
                raise InputError(
                    f"required a one-line header, ASCII residues, got {got}; correct it"
                )
            lines = [sequence[i : i + width] for i in range(0, len(sequence), width)]
            file.write("\n".join([f">{protein.header}", *lines, ""]).encode())
