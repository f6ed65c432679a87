"""One writer at a time in a folder."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distil_rank.core.errors import InputError

LOCK = ".lock"


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Hold a folder while writing in it; InputError that names the process which holds it.

    The lock ends with its process, however that ends: what a killed one left is no obstacle.
    """
    path = Path(folder) / LOCK
    file = _acquire(path)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _acquire(path: Path) -> int:
    import fcntl

    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode() or "another process"
            os.close(file)
            raise InputError(
                f"a folder that nobody else writes required, {path.parent} is held by {holder};"
                " wait for it, or choose another folder"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # its last holder removed it between our opening and locking it
