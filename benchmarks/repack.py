"""How the files of public repositories become those that the benchmarks read."""

import csv
import gzip
import hashlib
import pickle
import shutil
import textwrap
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from distil_rank.core.errors import InputError
from distil_rank.core.records import ROOT
from distil_rank.proteins.fasta import read_fasta

# rows of the two peptide files, in order: the first digits of the SHA-256 of their float32 values
ORDER = ROOT / "benchmarks" / "peptides.txt"
# all that a pickled table or list of arrays may name; anything else is refused, never called
PICKLED = {
    *("_codecs.encode", "builtins.slice", "numpy.ndarray", "numpy.dtype"),
    *(f"numpy.{x}.multiarray.{y}" for x in ("core", "_core") for y in ("_reconstruct", "scalar")),
    *(f"numpy.{x}.numeric._frombuffer" for x in ("core", "_core")),
    *("pandas.core.frame.DataFrame", "pandas._libs.internals._unpickle_block"),
    *("pandas.core.internals.managers.BlockManager", "pandas.core.indexes.base._new_Index"),
    *(f"pandas.core.indexes.{x}" for x in ("base.Index", "range.RangeIndex")),
    *(f"pandas.{x}" for x in ("DataFrame", "Index", "RangeIndex")),
}


def copy(sources: Sequence[Path], target: Path) -> None:
    shutil.copyfile(sources[0], target)


def write_gzip(target: Path, text: str) -> None:
    with target.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text.encode())


def peptides(sources: Sequence[Path], target: Path) -> None:
    """Rows of the tables (index, 320 numbers) in the order of ORDER, first those of training."""
    found = {}
    for source in sources:
        with source.open(newline="") as file:
            numbers = [[float(x) for x in row[1:]] for row in list(csv.reader(file))[1:]]
        for row in np.array(numbers, dtype=np.float32):
            found[row_digest(row)] = row
    train, val = (part.split() for part in ORDER.read_text().split("\n\n"))
    wanted = val if target.stem.endswith("val") else train
    if missing := sum(digest not in found for digest in wanted):
        raise InputError(
            f"{len(wanted)} peptides required, {missing} of them are not in the tables"
        )
    torch.save(torch.from_numpy(np.stack([found[digest] for digest in wanted])), target)


def row_digest(row: np.ndarray) -> str:
    return hashlib.sha256(row.tobytes()).hexdigest()[:9]


def tensors(sources: Sequence[Path], target: Path) -> None:
    """A state dict as safetensors."""
    state = torch.load(sources[0], weights_only=True)
    save_file({name: t.reshape(t.shape or 1).contiguous() for name, t in state.items()}, target)


def means(sources: Sequence[Path], target: Path) -> None:
    """A pickled array of {Variant_ID, pooled_embedding}."""
    with sources[0].open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise InputError(f"an array of NumPy's format 1.0 required in {sources[0]}")
        np.lib.format.read_array_header_1_0(file)
        rows = unpickled(file)
    x = np.stack([row["pooled_embedding"] for row in rows]).astype(np.float32)
    np.savez_compressed(target, X=x, ids=np.array([row["Variant_ID"] for row in rows]))


def table(sources: Sequence[Path], target: Path) -> None:
    """A pickled table of pandas: embeddings, then sequence and label."""
    with sources[0].open("rb") as file:
        frame = unpickled(file)
    x = np.ascontiguousarray(frame.iloc[:, :-2].to_numpy(np.float16))
    y = frame["label"].to_numpy(np.float32)
    np.savez(target, X=x, seq=np.array(list(frame["sequence"]), dtype=np.str_), y=y)


def unpickled(file: Any) -> Any:
    """What PICKLED allows; a file that names anything else is an InputError."""
    try:
        from pandas.compat.pickle_compat import Unpickler as Reader
    except ImportError:  # lists of arrays do not need it
        Reader = pickle.Unpickler

    class Restricted(Reader):  # type: ignore[misc,valid-type]
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" not in PICKLED:
                raise InputError(f"a pickle of arrays required, got one that calls {module}.{name}")
            return super().find_class(module, name)

    return Restricted(file).load()


def genomes(sources: Sequence[Path], target: Path) -> None:
    """Embeddings of all proteins and where each genome begins."""
    try:
        import h5py
    except ImportError:
        raise InputError("the package h5py required for this set; pip install h5py") from None
    with h5py.File(sources[0]) as file:
        x, starts = file["data"][:].astype(np.float32), file["ptr"][:].astype(np.int64)
    np.savez_compressed(target, X=x, ptr=starts)


def fasta_of_tables(sources: Sequence[Path], target: Path) -> None:
    """Distinct proteins of tables (identifier, sequence), sixty letters a line."""
    rows = (line.split("\t") for source in sources for line in source.read_text().splitlines())
    write_gzip(target, fasta(((row[0], row[1].strip()) for row in rows if len(row) > 1), 60))


def fasta_of_fastas(sources: Sequence[Path], target: Path) -> None:
    """Distinct proteins of FASTA files, a line each."""
    every = (protein for source in sources for protein in read_fasta(source))
    write_gzip(target, fasta((protein.id, protein.sequence) for protein in every))


def fasta(proteins: Iterable[tuple[str, str]], width: int = 10**6) -> str:
    """Distinct proteins, each by its first name."""
    names: dict[str, str] = {}
    for name, sequence in proteins:
        names.setdefault(sequence, name)
    return "".join(
        f">{name}\n" + "".join(f"{line}\n" for line in textwrap.wrap(sequence, width))
        for sequence, name in names.items()
    )


def families(sources: Sequence[Path], target: Path) -> None:
    """Pfam domains: a table with commas becomes one with tabs."""
    first, *rows = sources[0].read_text().splitlines()
    if first != "sequence,labels":
        raise InputError(f"the columns sequence,labels required in {sources[0]}, got {first}")
    write_gzip(
        target, "".join(f"{row.replace(',', chr(9))}\n" for row in ["sequence,family", *rows])
    )


def member(sources: Sequence[Path], target: Path) -> None:
    """NAME_sampled.fasta.gz is sampled.fasta of an archive."""
    wanted = target.name.removesuffix(".gz").rpartition("_")[2]
    with zipfile.ZipFile(sources[0]) as archive:
        found = [name for name in archive.namelist() if Path(name).name == wanted]
        found = [name for name in found if not name.startswith("__MACOSX")]
        if len(found) != 1:
            raise InputError(f"one {wanted} required in {sources[0]}, got {len(found)}")
        write_gzip(target, archive.read(found[0]).decode())
