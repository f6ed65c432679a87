"""Files that appear whole or not at all, and results as JSON with a passport.

A passport says what was run, on which data, by which code, on which machine.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from distil_rank.core.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # of a checkout: models/, results/, docs/ lie here
Record = dict[str, Any]  # a JSON object as read from disk, before anything is known of it


class Metric(TypedDict):
    """A measured value with its 95 % interval; `n` and the like say over what."""

    value: float
    low: float
    high: float
    higher_is_better: bool
    n: NotRequired[int]
    runs: NotRequired[int]
    proteins: NotRequired[int]
    residues: NotRequired[int]
    target: NotRequired[float]
    seeds_interval: NotRequired[tuple[float, float]]
    per_seed: NotRequired[list[float]]


def interval(value: float, low: float, high: float, higher_is_better: bool, **more: Any) -> Metric:
    """A metric as records hold it: value, 95 % interval and direction."""
    metric = Metric(value=value, low=low, high=high, higher_is_better=higher_is_better)
    return metric | more  # type: ignore[operator,return-value]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or a new folder; it takes its place at the end.

    An interrupted or failed block leaves the previous file untouched. A folder must not exist yet.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_file():
            temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextmanager
def atomic_files(folder: str | Path) -> Iterator[Path]:
    """A temporary folder; its files take their places in `folder` when the block ends."""
    folder = Path(folder)
    with TemporaryDirectory(prefix=".unfinished-", dir=folder) as temporary:
        yield Path(temporary)
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, folder / path.name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """NaN and infinity are errors."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path, schema: str | None = None) -> Record:
    """Read a JSON object, of the given schema if there is one; InputError where there is none."""
    what = "a JSON object" if schema is None else f"a JSON record of schema {schema}"
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{what} required, got {path}: {error}") from None
    found = record.get("schema") if isinstance(record, dict) else f"a {type(record).__name__}"
    if not isinstance(record, dict) or schema not in (None, found):
        raise InputError(f"{what} required, got {found} in {path}; run it again to renew it")
    return record


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], schema: str, **metadata: object
) -> None:
    """Write named tensors as safetensors, `schema` and metadata (as JSON) in the header."""
    from safetensors.torch import save_file

    header = {"schema": schema} | {k: json.dumps(v) for k, v in metadata.items()}
    with atomic(path) as temporary:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, temporary, metadata=header)
        _order_metadata(temporary)


def _order_metadata(path: Path) -> None:
    """Sort the metadata in place: the order in which safetensors writes it is a random one."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def load_tensors(path: str | Path, schema: str, what: str) -> tuple[dict[str, Tensor], Record]:
    """Read tensors and metadata written by `save_tensors`; InputError where the file is other."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.pop("schema", None) != schema:
                raise InputError(f"a file of {what} required, got {path}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"a safetensors file of {what} required, got {path}: {error}") from None
    return tensors, {key: json.loads(value) for key, value in header.items()}


def require_writable(folder: str | Path) -> Path:
    """Make the output folder and prove that a file can be written there, before any work starts."""
    folder = Path(folder)
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)  # who holds the folder may have cleaned it
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"a writable output folder required, got {folder} ({reason}); choose another"
        ) from None
    return folder


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown_path(path: str | Path) -> str:
    """A path as results show it: relative to the project where it lies inside, else two parts."""
    full = Path(path).resolve()
    return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else "/".join(full.parts[-2:])


def config_record(config: Any) -> Record:
    """A configuration dataclass as JSON values, with paths as results show them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path) or (isinstance(value, str) and os.path.isabs(value)):
            return shown_path(value)
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    fields = asdict(config) if is_dataclass(config) else dict(config)  # type: ignore[arg-type]
    return {k: plain(v) for k, v in fields.items()}


def environment(device: torch.device | str = "cpu") -> Record:
    """Code, versions and hardware behind a result; no host name, no path."""
    device = torch.device(device)
    return {
        **code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def code_version() -> Record:
    """Commit of the project and whether tracked files differ; None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    except FileNotFoundError:  # git is not installed
        commit = None
    if commit is None:
        return {"commit": None, "dirty": None}
    # results are what a run writes, so they do not make the code that wrote them dirty
    kept = ("status", "--porcelain", "-uno", "--", ".", ":!results", ":!benchmarks/results")
    return {"commit": commit, "dirty": bool(git(*kept))}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or sys.platform
