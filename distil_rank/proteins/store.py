"""A folder of embeddings: safetensors shards, an index of the proteins, and their provenance.

    store = EmbeddingStore("store/")
    len(store), store.provenance["model"], store.dim
    store["P69905"], store[0], "P69905" in store  # (d,) or, in a store of residues, (l, d)
    store[:100], store[["P69905", 7]], store.to_numpy()  # (n, d), or a list of (l, d)
    for rows in store.batches(): ...  # (n, d), in order: proteins, or residues one after the other
    for vectors in store: ...  # (d,) or (l, d), one protein after the other

| file | what |
|---|---|
| `store.json` | provenance: model, weights, pooling, layers, dtype, long sequences, proteins |
| `shard-00000.safetensors` ... | one tensor `layer_N` (rows, d) per layer, in order |
| `index.sqlite` | table `protein`: position, id, length, rows, sha256, shard, first row, header |
|  | table `shard`: number, sha256 of the file |

Shards are mapped, not read: memory grows by 24 bytes per protein once one is asked for, and not at
all while writing. A store can be pickled, and read by several threads and processes.
"""

import json
import operator
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, atomic, read_json
from distil_rank.proteins.store_index import INDEX, open_index

SCHEMA = "distil-rank/embeddings/1"
PROVENANCE = "store.json"
_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


class EmbeddingStore:
    """Read a store written by `distil-rank embed`; `layer` is one of those stored, or the last.

    Raises InputError where there is no store or an unfinished one, or where it has no such layer.

    >>> import tempfile
    >>> from distil_rank.proteins.command_embed import Config, run
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.fasta").write_text(">first\\nMKTAYIAKQR\\n")
    >>> run(Config(folder / "a.fasta", "nano-64", folder / "store"))  # doctest: +ELLIPSIS
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
        self.pool: str = self.provenance["pool"]  # a row is a protein (mean, bos) or a residue
        self.rows: int = self.provenance["rows"]  # how many
        self.dim: int = self.provenance["dim"]  # features d of each
        layers = self.provenance["layers"]
        if layer is not None and layer not in layers:
            raise InputError(f"a layer of {layers} required, got {layer}; embed again with it")
        self._layer = layers[-1] if layer is None else layer
        self._maps: dict[int, Tensor] = {}
        self._connection: tuple[int, sqlite3.Connection] | None = None

    def __getstate__(self) -> tuple[Path, int]:
        return self.path, self._layer

    def __setstate__(self, state: tuple[Path, int]) -> None:
        EmbeddingStore.__init__(self, *state)

    @property
    def _index(self) -> sqlite3.Connection:
        """The connection of this process: one that was there before a fork is not used."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = os.getpid(), open_index(self.path)
        return self._connection[1]

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """(shard, first row, rows) of every protein (n, 3)."""
        places = self._index.execute("SELECT shard, first_row, rows FROM protein ORDER BY position")
        flat = (number for place in places for number in place)
        return np.fromiter(flat, np.int64, 3 * len(self)).reshape(-1, 3)

    def __len__(self) -> int:
        return self.provenance["proteins"]

    @property
    def ids(self) -> list[str]:
        """Every id in order, repeated and empty ones too (this list is as long as the store)."""
        return self.column("id")

    def column(
        self, name: Literal["id", "length", "rows", "sha256", "shard", "first_row", "header"]
    ) -> list[Any]:
        """One column of the index, in order; sha256 is that of the cleaned sequence."""
        query = f"SELECT {name} FROM protein ORDER BY position"
        return [value for (value,) in self._index.execute(query)]

    def positions(self, id: str) -> list[int]:
        """Where the proteins with this id stand: none, one or, as ids may repeat, several."""
        query = "SELECT position FROM protein WHERE id = ? ORDER BY position"
        return [position for (position,) in self._index.execute(query, (id,))]

    def __contains__(self, id: object) -> bool:
        """Whether a protein has this id."""
        return isinstance(id, str) and bool(self.positions(id))

    def __getitem__(self, key: str | int | slice | Sequence[str | int]) -> Tensor | list[Tensor]:
        """Vector (d,) or residues (l, d) of a protein by id or by position.

        Of a slice or several keys, vectors (n, d), or a list of (l, d) in a store of residues.
        KeyError for an unknown or repeated id.
        """
        if isinstance(key, int | str):
            return self._one(self._position(key) if isinstance(key, str) else key)
        if isinstance(key, slice):
            key = range(len(self))[key]
        elif np.ndim(key) == 0:
            return self._one(operator.index(cast(SupportsIndex, key)))
        wanted = (self._position(k) if isinstance(k, str) else operator.index(k) for k in key)
        found = [self._one(position) for position in wanted]
        if self.pool == "residues":
            return found
        return torch.stack(found) if found else self._mapped(0)[:0].clone()

    def _position(self, id: str) -> int:
        found = self.positions(id)
        if len(found) != 1:
            raise KeyError(
                f"exactly one protein of id {id!r} required, got {len(found)}:"
                " use store.positions(id)"
            )
        return found[0]

    def _one(self, position: int) -> Tensor:
        if not -len(self) <= position < len(self):
            raise IndexError(f"a position below {len(self)} required, got {position}")
        shard, first, rows = self._places[position].tolist()
        if shard not in self._maps:
            self._maps[shard] = self._mapped(shard)
        vectors = self._maps[shard]
        found = vectors[first : first + rows] if self.pool == "residues" else vectors[first]
        return found.clone()

    def to_numpy(self) -> NDArray[Any]:
        """All vectors (rows, d) in memory, in order; bfloat16, which NumPy lacks, as float32."""
        vectors = torch.cat(list(self.batches()))
        return (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()

    def batches(self, rows: int = 8192, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
        """Vectors (n <= rows, d) in order. With several ranks, each gets every `world`-th shard."""
        for shard in range(rank, self.provenance["shards"], world):
            for vectors in self._mapped(shard).split(rows):
                yield vectors.clone()

    def _mapped(self, shard: int) -> Tensor:
        """The rows of a shard; they stay on the disk until they are read."""
        path = shard_path(self.path, shard)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(f"layer_{self._layer}")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"a whole shard required, got {path} ({error}); run the same embed command again"
            ) from error


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


@contextmanager
def new_shard(
    path: Path, layers: Sequence[int], rows: int, dim: int, dtype: torch.dtype
) -> Iterator[Callable[[int, Tensor], None]]:
    """A function that puts vectors (layers, n, d) at rows [row, row + n) of each layer.

    In any order, without holding them; InputError if the dtype cannot. The shard gets its name when
    the block ends and everything is on disk.
    """
    header = shard_header(layers, rows, dim, dtype)
    size = dim * dtype.itemsize
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + len(layers) * rows * size)

        def write(row: int, vectors: Tensor) -> None:
            cast = vectors.to(dtype)
            if not bool(cast.isfinite().all()):
                finite = bool(vectors.isfinite().all())
                remedy = "use --store-dtype float32"
                raise InputError(
                    f"finite {dtype} embeddings required, got values outside its range; "
                    + (remedy if finite else "this model computes NaN or infinity")
                )
            for i, layer in enumerate(cast):
                file.seek(len(header) + (i * rows + row) * size)
                file.write(layer.contiguous().view(torch.uint8).numpy().data)

        yield write
        file.flush()
        os.fsync(file.fileno())
