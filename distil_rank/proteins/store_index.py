"""The index of a store: which protein is where, and the checksum of each shard."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from distil_rank.core.records import atomic, sha256

INDEX = "index.sqlite"


def open_index(folder: Path) -> sqlite3.Connection:
    """The finished index of a store, read-only."""
    uri = (folder / INDEX).resolve().as_uri()
    return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, check_same_thread=False)


def checksums(folder: Path) -> dict[int, str]:
    """SHA-256 of each shard by the index; empty where there is no readable one."""
    return dict(_answer(folder, "SELECT number, sha256 FROM shard"))


def counts(folder: Path) -> tuple[int, ...]:
    """Proteins, last position + 1, rows, shards by the index; empty where there is none."""
    protein = "count(*), max(position) + 1, sum(rows), (SELECT count(*) FROM shard)"
    return next(iter(_answer(folder, f"SELECT {protein} FROM protein")), ())


def _answer(folder: Path, query: str) -> list[tuple]:
    try:
        with closing(open_index(folder)) as index:
            return index.execute(query).fetchall()
    except sqlite3.Error:
        return []


def copy_index(source: Path, folder: Path, shards: list[Path]) -> None:
    """The index of `source` for other shards of the same proteins."""
    with atomic(folder / INDEX) as temporary:
        shutil.copyfile(source / INDEX, temporary)
        with closing(sqlite3.connect(temporary)) as index, index:
            index.execute("PRAGMA journal_mode = OFF")
            index.execute("DELETE FROM shard")
            for number, path in enumerate(shards):
                insert(index, "shard", number, sha256(path))


@contextmanager
def new_index(folder: Path) -> Iterator[sqlite3.Connection]:
    """An index to `insert` into; it gets its name when the block ends and everything is on disk."""
    with atomic(folder / INDEX) as temporary:
        with closing(sqlite3.connect(temporary)) as index:
            # a crash leaves a temporary file that nobody reads: no journal needed
            index.executescript(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;"
                " CREATE TABLE protein (position INTEGER PRIMARY KEY, id TEXT NOT NULL,"
                " length INTEGER NOT NULL, rows INTEGER NOT NULL, sha256 TEXT NOT NULL,"
                " shard INTEGER NOT NULL, first_row INTEGER NOT NULL, header TEXT NOT NULL);"
                " CREATE TABLE shard (number INTEGER PRIMARY KEY, sha256 TEXT NOT NULL)"
            )
            yield index
            index.execute("CREATE INDEX protein_id ON protein (id)")
            index.commit()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def insert(index: sqlite3.Connection, table: str, *entry: int | str) -> None:
    """A protein (position, id, length, rows, sha256, shard, first row, header) or a shard."""
    index.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(entry))})", entry)
