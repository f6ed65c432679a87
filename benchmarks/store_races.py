"""Stores under attack: two writers in one folder, kill -9 at any time, and both at once.

    python -m benchmarks.store_races --trials 100   # writes benchmarks/results/store_races.json

A trial embeds the same proteins into a new folder by the code of `distil-rank embed`, in processes
of their own. After it, and after one more run, the store must equal that of an undisturbed run byte
for byte. Whenever a store can be opened in between, it must be whole already.
"""

import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from distil_rank.core.errors import InputError
from distil_rank.core.records import ROOT, Record, config_record, environment, write_json
from distil_rank.core.tables import markdown
from distil_rank.proteins.command_embed import Config as Embed
from distil_rank.proteins.command_embed import run
from distil_rank.proteins.fasta import AMINO_ACIDS, Protein, write_fasta
from distil_rank.proteins.store import EmbeddingStore

OUT, SCHEMA = ROOT / "benchmarks" / "results" / "store_races.json", "store-races/1"
HELD = 2  # exit status of a command that finds the folder held by another process


@dataclass(frozen=True)
class Config:
    trials: int = 100  # of each kind
    proteins: int = 30  # in five shards or so
    seed: int = 0  # of proteins and moments


def work(config: Embed) -> None:
    """One command in a process of its own."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            run(config)
        except InputError as error:
            sys.exit(HELD if "held by process" in str(error) else 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def opens(folder: Path) -> bool:
    with contextlib.suppress(InputError):
        EmbeddingStore(folder)
        return True
    return False


def attacked(
    kind: str,
    config: Embed,
    context: Any,
    whole: dict[str, bytes],
    shares: list[float],
    took: float,
) -> Counter[str]:
    """One trial: what happened, and `corrupt` if anything was; `took` seconds last a whole run."""
    seen: Counter[str] = Counter()
    writers = [context.Process(target=work, args=(config,)) for _ in range(1 + ("two" in kind))]
    for writer, share in zip(writers, (0.0, shares[0])):
        time.sleep(share * took)
        writer.start()
    if "kill" in kind:
        time.sleep(shares[1] * took)
        writers[0].kill()
    for writer in writers:
        writer.join()
        names = {0: "finished", HELD: "named the holder", -9: "killed"}
        seen[names.get(writer.exitcode, "failed")] += 1
    readable = opens(config.out)
    seen["unfinished, and refused by a reader"] += not readable
    wrong = readable and contents(config.out) != whole
    run(config)
    seen["corrupt"] += wrong or contents(config.out) != whole
    return seen


def main(config: Config) -> None:
    torch.set_num_threads(1)
    draw, context = random.Random(config.seed), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distil_rank.proteins.command_embed"])
    kinds: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere:
        folder = Path(name)
        letters = ("".join(draw.choices(AMINO_ACIDS, k=draw.randint(20, 60))) for _ in range(99999))
        records = (Protein(f"p{i}", f"p{i}", next(letters)) for i in range(config.proteins))
        write_fasta(folder / "p.fasta", records)
        asked = Embed(folder / "p.fasta", "nano-64", folder / "whole", shard_residues=240)
        asked = replace(asked, device="cpu", batch_tokens=128)
        for out in (asked.out, folder / "timing"):  # the first one starts the server
            started = time.perf_counter()
            first = context.Process(target=work, args=(replace(asked, out=out),))
            first.start()
            first.join()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            took = time.perf_counter() - started
            whole = contents(asked.out)
            for kind in ("two writers", "kill", "two writers, one killed"):
                kinds[kind] = Counter(trials=config.trials)
                for trial in range(config.trials):
                    one = replace(asked, out=folder / f"{kind} {trial}")
                    shares = [draw.random(), draw.random()]
                    kinds[kind] += attacked(kind, one, context, whole, shares, took)
    record = {
        "schema": SCHEMA,
        "config": {**config_record(config), "model": "nano-64", "shards": len(whole) - 2},
        "trials": {kind: dict(seen) | {"corrupt": seen["corrupt"]} for kind, seen in kinds.items()},
        "environment": environment(),
        "machine_dependent": ["trials", "environment"],
    }
    write_json(OUT, record)
    print(record["trials"])


def table(record: Record) -> str:
    """What happened in the trials of each kind, by process and by store."""
    events = ["trials", "finished", "named the holder", "killed", "corrupt"]
    rows = [["attack", *events[:-1], "corrupt stores"]]
    for kind, seen in record["trials"].items():
        rows.append([kind, *(str(seen.get(event, 0)) for event in events)])
    return markdown(rows)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
