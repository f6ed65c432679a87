"""A folder of embeddings: safetensors shards in the order of the FASTA, an index of the proteins, and their provenance.

    store = EmbeddingStore("store/")
    len(store), store.provenance["model"], store.dim
    store["P69905"], store[0]                  # (d,) or, in a store of residues, (l, d)
    for rows in store.batches(): ...           # (n, d), in order: proteins, or residues one after the other
    for index, vectors in store.residues(): ...   # (protein index, (l, d)), in order

| file | what |
|---|---|
| `store.json` | provenance: model, weights, pooling, layers, dtype, treatment of long sequences, proteins |
| `shard-00000.safetensors` ... | one tensor `layer_N` (rows, d) per layer |
| `index.sqlite` | table `protein`: position, id, length, rows, sha256 of the sequence, shard, first row; written last |

Memory does not grow with the number of proteins, neither here nor while writing.
"""

import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import read_json

SCHEMA = "distil-rank/embeddings/1"
PROVENANCE, INDEX = "store.json", "index.sqlite"
_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


class EmbeddingStore:
    """Read a store written by `distil-rank embed`; `layer` chooses one of several (default: the last one stored).

    Raises InputError where there is no store or an unfinished one, or where it has no such layer.
    """

    def __init__(self, path: str | Path, layer: int | None = None) -> None:
        self.path = Path(path)
        self.provenance: dict[str, Any] = read_json(self.path / PROVENANCE, SCHEMA)
        if not (self.path / INDEX).is_file():
            raise InputError(f"a finished store required, got {path} without {INDEX}; run the same embed command again")
        layers = self.provenance["layers"]
        if layer is not None and layer not in layers:
            raise InputError(f"a layer of {layers} required, got {layer}; embed again with it")
        self._tensor = f"layer_{layers[-1] if layer is None else layer}"
        self._index = sqlite3.connect((self.path / INDEX).resolve().as_uri() + "?mode=ro&immutable=1", uri=True)
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

    def column(self, name: Literal["id", "length", "rows", "sha256", "shard", "first_row"]) -> list[Any]:
        """One column of the index, in order."""
        return [value for (value,) in self._index.execute(f"SELECT {name} FROM protein ORDER BY position")]

    def positions(self, id: str) -> list[int]:
        """Where the proteins with this id stand: none, one or, as ids may repeat, several."""
        return [p for (p,) in self._index.execute("SELECT position FROM protein WHERE id = ? ORDER BY position", (id,))]

    def describe(self, position: int) -> dict[str, Any]:
        """The index entry of one protein: id, length, rows, sha256 of the sequence, shard, first row."""
        cursor = self._index.execute("SELECT * FROM protein WHERE position = ?", (range(len(self))[position],))
        return dict(zip((column[0] for column in cursor.description), cursor.fetchone()))

    def __getitem__(self, key: str | int) -> Tensor:
        """Vector (d,) or residues (l, d) of a protein by id or by position. KeyError for an unknown or repeated id."""
        if isinstance(key, str):
            found = self.positions(key)
            if len(found) != 1:
                raise KeyError(f"exactly one protein of id {key!r} required, got {len(found)}: use store.positions(id)")
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
            raise InputError(f"a whole shard required, got {path} ({error}); embed again") from error

    def _rows(self, shard: int, start: int, rows: int) -> Tensor:
        return self._shard(shard).get_slice(self._tensor)[start : start + rows]


class ShardWriter:
    """Write rows of a new shard in any order without holding it: a safetensors file filled in place, then renamed.

    The layout is safetensors' own (8 bytes of header length, a JSON header, the tensors one after the other).
    """

    def __init__(self, path: Path, layers: list[int], rows: int, dim: int, dtype: torch.dtype) -> None:
        self.path, self._temporary, self._dtype = path, path.with_name(path.name + ".tmp"), dtype
        self._row = dim * dtype.itemsize
        self._tensor = rows * self._row
        tensors = {
            f"layer_{layer}": {
                "dtype": _SAFETENSORS_DTYPE[dtype],
                "shape": [rows, dim],
                "data_offsets": [i * self._tensor, (i + 1) * self._tensor],
            }
            for i, layer in enumerate(layers)
        }
        header = json.dumps(tensors).encode()
        header += b" " * (-len(header) % 8)
        self._start = 8 + len(header)
        self._file = self._temporary.open("wb")
        self._file.write(struct.pack("<Q", len(header)) + header)
        self._file.truncate(self._start + len(layers) * self._tensor)

    def write(self, row: int, vectors: Tensor) -> None:
        """Put vectors (layers, n, d) at rows [row, row + n) of each layer; InputError if the dtype cannot hold them."""
        cast = vectors.to(self._dtype)
        if not bool(cast.isfinite().all()):
            cause = (
                "this model computes NaN or infinity" if not bool(vectors.isfinite().all()) else "use --dtype float32"
            )
            raise InputError(f"finite {self._dtype} embeddings required, got values outside its range; {cause}")
        for i, rows in enumerate(cast):
            self._file.seek(self._start + i * self._tensor + row * self._row)
            self._file.write(rows.contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Everything is on disk before the shard gets its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)


class IndexWriter:
    """Write the index protein by protein; it gets its name when everything is in it."""

    def __init__(self, folder: Path) -> None:
        self._path, self._temporary = folder / INDEX, folder / f"{INDEX}.tmp"
        self._temporary.unlink(missing_ok=True)
        self._database = sqlite3.connect(self._temporary)
        # a crash leaves a temporary file that nobody reads: no journal needed
        self._database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;")
        self._database.execute(
            "CREATE TABLE protein (position INTEGER PRIMARY KEY, id TEXT NOT NULL, length INTEGER NOT NULL,"
            " rows INTEGER NOT NULL, sha256 TEXT NOT NULL, shard INTEGER NOT NULL, first_row INTEGER NOT NULL)"
        )

    def add(self, *entry: int | str) -> None:
        """position, id, length, rows, sha256, shard, first row."""
        self._database.execute("INSERT INTO protein VALUES (?, ?, ?, ?, ?, ?, ?)", entry)

    def close(self) -> None:
        self._database.execute("CREATE INDEX protein_id ON protein (id)")
        self._database.commit()
        self._database.close()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._temporary, self._path)
