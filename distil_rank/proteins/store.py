"""A folder of embeddings: safetensors shards, an index of the proteins, and their provenance.

    store = EmbeddingStore("store/")
    len(store), store.provenance["model"], store.dim
    store["P69905"], store[0], "P69905" in store  # (d,) or, in a store of residues, (l, d)
    for rows in store.batches(): ...  # (n, d), in order: proteins, or residues one after the other
    for index, vectors in store.residues(): ...  # (protein index, (l, d)), in order

| file | what |
|---|---|
| `store.json` | provenance: model, weights, pooling, layers, dtype, long sequences, proteins |
| `shard-00000.safetensors` ... | one tensor `layer_N` (rows, d) per layer, in order |
| `index.sqlite` | table `protein`: position, id, length, rows, sha256, shard, first row |

Memory does not grow with the number of proteins, neither here nor while writing.
"""

import json
import os
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, atomic, read_json

SCHEMA = "distil-rank/embeddings/1"
PROVENANCE, INDEX = "store.json", "index.sqlite"
_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def open_index(folder: Path) -> sqlite3.Connection:
    """The finished index of a store, read-only."""
    uri = (folder / INDEX).resolve().as_uri()
    return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)


class EmbeddingStore:
    """Read a store written by `distil-rank embed`; `layer` is one of those stored, or the last.

    Raises InputError where there is no store or an unfinished one, or where it has no such layer.

    >>> import tempfile
    >>> from distil_rank.proteins import command_embed
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.fasta").write_text(">first\\nMKTAYIAKQR\\n")
    >>> quiet = dict(model="nano-64", out=folder / "store", device="cpu")
    >>> command_embed.run(command_embed.Config(folder / "a.fasta", **quiet))  # doctest: +ELLIPSIS
    /...
    >>> EmbeddingStore(folder / "store")["first"].shape
    torch.Size([64])
    """

    def __init__(self, path: str | Path, layer: int | None = None) -> None:
        self.path = Path(path)
        self.provenance: Record = read_json(self.path / PROVENANCE, SCHEMA)
        if not (self.path / INDEX).is_file():
            raise InputError(
                f"a finished store required, got {path} without {INDEX};"
                " run the same embed command again"
            )
        layers = self.provenance["layers"]
        if layer is not None and layer not in layers:
            raise InputError(f"a layer of {layers} required, got {layer}; embed again with it")
        self._tensor = f"layer_{layers[-1] if layer is None else layer}"
        self._index = open_index(self.path)
        # A file handle of safetensors maps its shard; keep a few, not one per shard.
        self._shard = lru_cache(maxsize=4)(self._open_shard)

    def __len__(self) -> int:
        return self.provenance["proteins"]

    @property
    def pool(self) -> str:
        """What a row is: `mean` or `bos` (one per protein) or `residues` (one per residue)."""
        return self.provenance["pool"]

    @property
    def rows(self) -> int:
        """Number of vectors: proteins, or residues in a store of residues."""
        return self.provenance["rows"]

    @property
    def dim(self) -> int:
        """Features d of each vector."""
        return self.provenance["dim"]

    @property
    def ids(self) -> list[str]:
        """Every id in order, repeated and empty ones too (this list is as long as the store)."""
        return [id for (id,) in self._index.execute("SELECT id FROM protein ORDER BY position")]

    def column(
        self, name: Literal["id", "length", "rows", "sha256", "shard", "first_row"]
    ) -> list[Any]:
        """One column of the index, in order."""
        query = f"SELECT {name} FROM protein ORDER BY position"
        return [value for (value,) in self._index.execute(query)]

    def positions(self, id: str) -> list[int]:
        """Where the proteins with this id stand: none, one or, as ids may repeat, several."""
        query = "SELECT position FROM protein WHERE id = ? ORDER BY position"
        return [position for (position,) in self._index.execute(query, (id,))]

    def __contains__(self, id: object) -> bool:
        """Whether a protein has this id."""
        return isinstance(id, str) and bool(self.positions(id))

    def describe(self, position: int) -> Record:
        """The index entry of one protein; sha256 is that of its cleaned sequence."""
        query = "SELECT * FROM protein WHERE position = ?"
        cursor = self._index.execute(query, (range(len(self))[position],))
        return dict(zip((column[0] for column in cursor.description), cursor.fetchone()))

    def __getitem__(self, key: str | int) -> Tensor:
        """Vector (d,) or residues (l, d) of a protein by id or by position.

        KeyError for an unknown or repeated id.
        """
        if isinstance(key, str):
            found = self.positions(key)
            if len(found) != 1:
                raise KeyError(
                    f"exactly one protein of id {key!r} required, got {len(found)}:"
                    " use store.positions(id)"
                )
            key = found[0]
        entry = self.describe(key)
        rows = self._rows(entry["shard"], entry["first_row"], entry["rows"])
        return rows if self.pool == "residues" else rows[0]

    def batches(self, rows: int = 8192, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
        """Vectors (n <= rows, d) in order. With several ranks, each gets every `world`-th shard."""
        for shard in range(rank, self.provenance["shards"], world):
            size = self._shard(shard).get_slice(self._tensor).get_shape()[0]
            for start in range(0, size, rows):
                yield self._rows(shard, start, min(rows, size - start))

    def residues(self) -> Iterator[tuple[int, Tensor]]:
        """(protein index, vectors (l, d)) in order; l is 1 unless this is a store of residues.

        Stores of the same proteins from several models are aligned row by row.
        """
        query = "SELECT position, shard, first_row, rows FROM protein ORDER BY position"
        for position, shard, start, rows in self._index.execute(query):
            yield position, self._rows(shard, start, rows)

    def _open_shard(self, shard: int) -> Any:
        from safetensors import SafetensorError, safe_open

        path = shard_path(self.path, shard)
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"a whole shard required, got {path} ({error}); run the same embed command again"
            ) from error

    def _rows(self, shard: int, start: int, rows: int) -> Tensor:
        return self._shard(shard).get_slice(self._tensor)[start : start + rows]


def shard_header(layers: Sequence[int], rows: int, dim: int, dtype: torch.dtype) -> bytes:
    """How a whole shard begins; safetensors' own layout, the tensors one after the other."""
    size = rows * dim * dtype.itemsize
    tensors = {
        f"layer_{layer}": {
            "dtype": _SAFETENSORS_DTYPE[dtype],
            "shape": [rows, dim],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i, layer in enumerate(layers)
    }
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def is_whole(path: Path, layers: Sequence[int], rows: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether a shard is there, with the header and the size that it must have."""
    header = shard_header(layers, rows, dim, dtype)
    size = len(header) + len(layers) * rows * dim * dtype.itemsize
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


class ShardWriter:
    """Write rows of a new shard in any order without holding it; it gets its name on `close`."""

    def __init__(
        self, path: Path, layers: Sequence[int], rows: int, dim: int, dtype: torch.dtype
    ) -> None:
        self._stack, self._dtype = ExitStack(), dtype
        self._row = dim * dtype.itemsize
        self._tensor = rows * self._row
        header = shard_header(layers, rows, dim, dtype)
        self._start = len(header)
        self._file = self._stack.enter_context(atomic(path)).open("wb")
        self._file.write(header)
        self._file.truncate(self._start + len(layers) * self._tensor)

    def write(self, row: int, vectors: Tensor) -> None:
        """Put vectors (layers, n, d) at rows [row, row + n) of each layer.

        InputError if the dtype cannot hold them.
        """
        cast = vectors.to(self._dtype)
        if not bool(cast.isfinite().all()):
            finite = bool(vectors.isfinite().all())
            raise InputError(
                f"finite {self._dtype} embeddings required, got values outside its range; "
                + ("use --store-dtype float32" if finite else "this model computes NaN or infinity")
            )
        for i, rows in enumerate(cast):
            self._file.seek(self._start + i * self._tensor + row * self._row)
            self._file.write(rows.contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Everything is on disk before the shard gets its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._stack.close()


class IndexWriter:
    """Write the index protein by protein; it gets its name when everything is in it."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._temporary = self._stack.enter_context(atomic(folder / INDEX))
        self._database = sqlite3.connect(self._temporary)
        # a crash leaves a temporary file that nobody reads: no journal needed
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;"
            " CREATE TABLE protein (position INTEGER PRIMARY KEY, id TEXT NOT NULL,"
            " length INTEGER NOT NULL, rows INTEGER NOT NULL, sha256 TEXT NOT NULL,"
            " shard INTEGER NOT NULL, first_row INTEGER NOT NULL)"
        )

    def add(self, *entry: int | str) -> None:
        """position, id, length, rows, sha256, shard, first row."""
        self._database.execute("INSERT INTO protein VALUES (?, ?, ?, ?, ?, ?, ?)", entry)

    def close(self) -> None:
        """The index is on disk before it gets its name."""
        self._database.execute("CREATE INDEX protein_id ON protein (id)")
        self._database.commit()
        self._database.close()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._stack.close()
