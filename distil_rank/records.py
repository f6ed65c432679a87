"""Results as JSON with a passport: what was run, on which data, by which code, on which machine."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from distil_rank.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all: to a temporary name, then renamed. NaN and infinity are errors."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | Path, schema: str) -> dict[str, Any]:
    """Read a record of the given schema; InputError where there is none."""
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"a JSON record of schema {schema} required, got {path}: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != schema:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise InputError(f"a record of schema {schema} required, got {found} in {path}; run it again to renew it")
    return record


def interval(value: float, low: float, high: float, higher_is_better: bool, **more: Any) -> dict[str, Any]:
    """A metric as records hold it: value, 95 % interval and direction."""
    return {"value": value, "low": low, "high": high, "higher_is_better": higher_is_better, **more}


def require_writable(folder: str | Path) -> Path:
    """Make the output folder and prove that a file can be written there, before any work starts."""
    folder = Path(folder)
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"a writable output folder required, got {folder} ({reason}); choose another") from None
    return folder


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown_path(path: str | Path) -> str:
    """A path as results show it: relative to the project where it lies inside, else its last two parts."""
    full = Path(path).resolve()
    return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else "/".join(full.parts[-2:])


def config_record(config: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON values, with paths as results show them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path) or (isinstance(value, str) and os.path.isabs(value)):
            return shown_path(value)
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    return {k: plain(v) for k, v in (asdict(config) if is_dataclass(config) else dict(config)).items()}  # type: ignore[arg-type]


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
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


def code_version() -> dict[str, Any]:
    """Commit of the project and whether tracked files differ from it; None outside a git checkout."""

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
    return {
        "commit": commit,
        "dirty": bool(git("status", "--porcelain", "-uno", "--", ".", ":!results", ":!benchmarks/results")),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or sys.platform
