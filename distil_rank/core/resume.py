"""Work that goes on where it was killed: the state of one computation, a cache of finished ones.

Both know their request. A checkpoint of another request is refused, a cached result of another one
is never found. The third mechanism, a store of shards, is `proteins.store`.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, atomic, load_tensors, save_tensors, write_json

CACHED = "distil-rank/cached/1"


def fingerprint(*request: object) -> str:
    """SHA-256 of what a computation depends on: JSON values, dataclasses, paths, tensors."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest = hashlib.sha256(data.tobytes()).hexdigest()
            return [str(value.dtype), list(value.shape), digest]
        if is_dataclass(value) and not isinstance(value, type):
            return asdict(value)
        return str(value)

    text = json.dumps(request, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


class Checkpoint:
    """The state of one long computation, saved now and then, resumed by the same request alone.

    A state is a mapping of tensors, numbers, strings and containers of these: nothing is unpickled.
    """

    def __init__(self, path: str | Path, *request: object):
        self.path, self.identity = Path(path), fingerprint(*request)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state on disk; a kill leaves this one or the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self.path) as temporary:
            torch.save({"identity": self.identity, "state": dict(state)}, temporary)

    def load(self) -> Record | None:
        """The last state, None where there is none; InputError where it is of another request."""
        if not self.path.is_file():
            return None
        remedy = "remove it to start anew, or choose another folder"
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            identity, state = found["identity"], found["state"]
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError):
            raise InputError(f"a whole checkpoint required, got {self.path}; {remedy}") from None
        if identity != self.identity:
            raise InputError(
                "a checkpoint of this very request (data, model and options) required,"
                f" {self.path} is of another; {remedy}"
            )
        return state

    def clear(self) -> None:
        """Remove the state of a computation that is done."""
        self.path.unlink(missing_ok=True)


class Cache:
    """Finished results in a folder, by the fingerprint of their request."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, name: str, *request: object, suffix: str = "json") -> Path:
        """Where the result of a request lies: NAME.FINGERPRINT.SUFFIX."""
        return self.folder / f"{name}.{fingerprint(*request)[:16]}.{suffix}"

    def json(self, name: str, request: object, make: Callable[[], Mapping[str, Any]]) -> Record:
        """The record of a request, made once."""
        path = self.path(name, request)
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, make())
        return json.loads(path.read_text())

    def tensors(
        self, name: str, request: object, make: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors of a request, made once."""
        path = self.path(name, request, suffix="safetensors")
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(path, make(), CACHED)
        return load_tensors(path, CACHED, "cached tensors")[0]
