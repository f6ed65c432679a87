"""Download the public data behind the committed figures, as the benchmarks read them.

    python -m benchmarks.real_data DIR               # what is there and right is kept
    python -m benchmarks.real_data DIR heads dms     # some folders of it
    python -m benchmarks.real_data --list            # sets, licenses, sources: needs no network
    DISTIL_RANK_DATA=DIR python -m benchmarks.heads

No set is part of this repository: each keeps the license of its source. An interrupted download
goes on; what arrives is repacked and takes its place only if its SHA-256 is the one that the
committed results were measured on (of a compressed file: of what it unpacks to, because versions of
zlib write other bytes). Sources are pinned to a commit. Two sets need pandas or h5py to repack.
"""

import gzip
import hashlib
import shutil
import sys
import tomllib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

from tqdm import tqdm

from benchmarks import repack
from distil_rank.core.errors import InputError, one_line_errors
from distil_rank.core.records import ROOT, atomic_files, read_json, require_writable, sha256
from distil_rank.core.tables import markdown

SETS = ROOT / "benchmarks" / "real_data.toml"
GITHUB = "https://raw.githubusercontent.com/"
SCANS = "ginnm/SingleSiteProteinGYM", "9844690432e30a6fc0d79b29a03822787405e20a/gym_single"
DOWNLOADS = ".downloads"  # in DIR, until a set is made


@dataclass(frozen=True)
class Set:
    """One file: its place in DIR, the digest of its content, how it is made and of what."""

    path: str
    sha256: str
    made: str
    addresses: tuple[str, ...]
    repository: str
    license: str
    cite: str


def known() -> list[Set]:
    """The sets of SETS, and the scans that benchmarks.scores was measured on."""
    sources = tomllib.loads(SETS.read_text())
    scores = ROOT / "benchmarks" / "results" / "scores.json"
    repository, folder = SCANS
    sources[repository]["sets"] = [
        {
            "path": f"dms/{name}",
            "sha256": digest,
            "made": "copy",
            "from": [f"{folder}/{'mutant' if name.endswith('.csv') else 'fasta'}/{name}"],
        }
        for name, digest in read_json(scores, "distil-rank/benchmark-scores/1")["data"].items()
    ]
    found = []
    for repository, source in sources.items():
        for s in source["sets"]:
            paths = s.get("from") or source["from"]
            addresses = tuple(f"{GITHUB}{repository}/{quote(path)}" for path in paths)
            about = repository, source["license"], source["cite"]
            found.append(Set(s["path"], s["sha256"], s["made"], addresses, *about))
    return found


def content(path: Path) -> str:
    """SHA-256 of a file; of a compressed one, of what it unpacks to, where it does."""
    if path.suffix == ".gz":
        try:
            with gzip.open(path) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, EOFError, zlib.error):
            return "what cannot be unpacked"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                parts = map(archive.read, sorted(archive.namelist()))
                return hashlib.sha256(b"".join(parts)).hexdigest()
    return sha256(path)


def place(s: Set, folder: Path) -> str:
    """Make one set unless it is there; returns what was done. InputError where it differs."""
    target = folder / s.path
    if target.is_file() and content(target) == s.sha256:
        return "kept"
    sources = [download(address, require_writable(folder / DOWNLOADS)) for address in s.addresses]
    with atomic_files(require_writable(target.parent)) as fresh:
        made = fresh / target.name
        getattr(repack, s.made)(sources, made)
        if (found := content(made)) != s.sha256:
            for path in sources:
                path.unlink()
            raise InputError(
                f"content {s.sha256[:12]} required in {s.path}, got {found[:12]} from"
                f" {s.repository}; the downloads are removed: run it again"
            )
    return "made"


def download(address: str, folder: Path) -> Path:
    """The file behind an address, which goes on where it was interrupted."""
    name = hashlib.sha256(address.encode()).hexdigest()[:12]
    path = folder / f"{name}{''.join(Path(address).suffixes[-2:])}"
    whole = path.with_name(f"{path.name}.whole")
    if path.is_file() and whole.is_file():
        return path
    whole.unlink(missing_ok=True)
    start = path.stat().st_size if path.is_file() else 0
    request = Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urlopen(request, timeout=60) as answer:
            start = start if answer.status == 206 else 0  # else it comes as a whole
            total = start + int(answer.headers.get("Content-Length", 0))
            mode, bar = "ab" if start else "wb", {"initial": start, "leave": False, "disable": None}
            with path.open(mode) as file, tqdm.wrapattr(file, "write", total, **bar) as counted:
                shutil.copyfileobj(answer, counted)
    except (OSError, ValueError, HTTPException) as error:
        if getattr(error, "code", None) == 416:  # it was whole, or longer than the file there
            path.unlink()
        raise InputError(
            f"{address} required, got: {error}; what arrived is kept: run it again"
        ) from None
    if path.stat().st_size < total:
        got = f"{path.stat().st_size} of {total} bytes"
        raise InputError(f"{address} required, got {got}; they are kept: run it again")
    whole.touch()
    return path


def listing(sets: Sequence[Set]) -> str:
    rows = [["file", "license", "repository", "cite", "SHA-256 of its content"]]
    rows += [[s.path, s.license, s.repository, s.cite, s.sha256] for s in sets]
    return markdown(rows)


def main(arguments: list[str]) -> int:
    """Number of sets that could not be had."""
    sets = known()
    if arguments == ["--list"]:
        print(listing(sets))
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise InputError("a folder or --list required, got neither; see the head of this file")
    folders = {s.path.partition("/")[0] for s in sets}
    if unknown := set(arguments[1:]) - folders:
        wanted = ", ".join(sorted(folders))
        raise InputError(f"folders out of {wanted} required, got {', '.join(unknown)}")
    folder = require_writable(Path(arguments[0]))
    failed = 0
    for s in sets:
        if arguments[1:] and s.path.partition("/")[0] not in arguments[1:]:
            continue
        try:
            print(f"{place(s, folder)}: {s.path} ({s.license}, {s.repository})")
        except InputError as error:
            failed += 1
            print(f"missing: {error}", file=sys.stderr)
    if not failed:
        shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)
    return failed


if __name__ == "__main__":
    with one_line_errors("benchmarks.real_data"):
        raise SystemExit(min(1, main(sys.argv[1:])))
