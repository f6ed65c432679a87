"""FASTA in and out: plain or gzip, in order, streaming; odd ids are data, odd letters have one documented meaning.

What happens to a letter on its way to a model (`clean_sequence`; the alphabet is ESM-2's, fair-esm `esm.constants`):

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
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from distil_rank.core.errors import InputError

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
ALPHABET = AMINO_ACIDS + "XBUZO"
GAPS = "-."
_GAP, _UNKNOWN, _FOREIGN = (
    re.compile(f"[{re.escape(GAPS)}]"),
    re.compile("[J*]"),
    re.compile(f"[^{ALPHABET}]"),
)


@dataclass(frozen=True)
class Protein:
    """One FASTA record: `id` is the first word of `header` (may be empty, repeated, or look like a path)."""

    id: str
    header: str
    sequence: str


def read_fasta(path: str | Path) -> Iterator[Protein]:
    """Records of a FASTA file, plain or gzip, in file order and as written (nothing cleaned).

    The file is checked as a whole before this returns (one streaming pass: a truncated gzip or a binary file raises
    here, not after an hour of work); records are then streamed, and no index file is written. Raises InputError.
    """
    _check(Path(path))
    return _records(Path(path))


def _records(path: Path) -> Iterator[Protein]:
    import pyfastx

    try:
        for name, sequence, comment in pyfastx.Fastx(str(path), format="fasta", comment=True):
            yield Protein(name, f"{name} {comment}" if comment else name, sequence)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise InputError(
            f"required a FASTA file in UTF-8, got {path} ({error}); check the file"
        ) from error


def _check(path: Path) -> None:
    """One pass over the bytes: pyfastx itself ends silently at a truncated gzip and cuts a sequence at a NUL byte."""
    remedy = "give a FASTA file (lines `>id description`, then the sequence), plain or gzip"
    if not path.is_file():
        found = "a folder or special file" if path.exists() else "nothing there"
        raise InputError(f"required a FASTA file at {path}, got {found}; {remedy}")
    try:
        with path.open("rb") as probe:
            opener = gzip.open if probe.read(2) == b"\x1f\x8b" else open
        with opener(path, "rb") as file:
            start = b""
            while chunk := file.read(1 << 20):
                start = start or chunk.lstrip()[:1]
                if start not in (b"", b">"):
                    raise InputError(
                        f"required a FASTA file, but {path} does not begin with '>'; {remedy}"
                    )
                if b"\0" in chunk:
                    raise InputError(
                        f"required a FASTA text file, but {path} holds binary data; {remedy}"
                    )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"required a whole gzip file, got {path} ({error}); copy or compress it again"
        ) from error
    except OSError as error:
        raise InputError(
            f"required a readable FASTA file, got {path} ({error.strerror}); {remedy}"
        ) from error
    if not start:
        raise InputError(f"required at least one protein, but {path} is empty; {remedy}")


def clean_sequence(sequence: str) -> str:
    """The residues a model sees, by the table above. May be empty. Raises InputError on letters that mean nothing."""
    clean, _, foreign = _clean(sequence)
    if foreign:
        got = " ".join(sorted(foreign))
        raise InputError(
            f"required letters of {ALPHABET} (or J * - .), got {got}; correct the sequence"
        )
    return clean


def _clean(sequence: str) -> tuple[str, Counter[str], set[str]]:
    """Cleaned sequence, how often each reported change was made, and the letters that mean nothing."""
    letters = "".join(sequence.split()).upper().removesuffix("*")
    changes: Counter[str] = Counter()
    letters, changes["gaps removed"] = _GAP.subn("", letters)
    letters, changes["J or inner * read as X"] = _UNKNOWN.subn("X", letters)
    return letters, +changes, set(_FOREIGN.findall(letters))


def clean_proteins(proteins: Iterable[Protein], warn: Callable[[str], None]) -> Iterator[Protein]:
    """The proteins with cleaned sequences, streaming.

    When all have passed, `warn` gets one line per kind of change with counts and ids, and empty sequences or
    meaningless letters raise InputError naming the ids: run through a file once before the work starts.
    """
    changes: Counter[str] = Counter()
    changed: dict[str, _Names] = {}
    foreign, empty = _Names(), _Names()
    for position, protein in enumerate(proteins, start=1):
        sequence, counts, letters = _clean(protein.sequence)
        name = protein.id or f"(record {position}, no id)"
        changes += counts
        for kind in counts:
            changed.setdefault(kind, _Names()).add(name)
        if letters:
            foreign.add(f"{name} ({''.join(sorted(letters))})")
        elif not sequence:
            empty.add(name)
        yield replace(protein, sequence=sequence)
    if foreign.count:
        raise InputError(
            f"required letters of {ALPHABET} (or J * - .), got {foreign}; correct or remove them"
        )
    if empty.count:
        raise InputError(
            f"required at least one residue per protein, got none in {empty}; remove them"
        )
    for kind, names in changed.items():
        warn(f"{kind}: {changes[kind]} in {names}")


class _Names:
    """A count and the first few names, so that a message stays short and memory constant."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, name: str) -> None:
        self.count += 1
        if self.count <= 5:
            self.first.append(name)

    def __str__(self) -> str:
        more = f", and {self.count - 5} more" if self.count > 5 else ""
        return f"{self.count} protein{'s' if self.count > 1 else ''}: {', '.join(self.first)}{more}"


def write_fasta(path: str | Path, proteins: Iterable[Protein], width: int = 60) -> None:
    """Write records as FASTA, gzip when the name ends in .gz (without a time stamp: equal records, equal bytes)."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as raw:
        file = (
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
            if path.suffix == ".gz"
            else raw
        )
        for protein in proteins:
            if "\n" in protein.header or not protein.sequence.isascii():
                raise InputError(
                    f"required a one-line header, ASCII residues, got {protein.header[:60]!r}; correct it"
                )
            lines = [
                protein.sequence[i : i + width] for i in range(0, len(protein.sequence), width)
            ]
            file.write("\n".join([f">{protein.header}", *lines, ""]).encode())
        if file is not raw:
            file.close()
    temporary.replace(path)
