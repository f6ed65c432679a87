"""Embedding speed, memory and reading: `distil-rank embed` against the classic way, random weights.

    python -m benchmarks.embedding                       # all: benchmarks/results/embedding.json
    python -m benchmarks.embedding --parts memory reading    # these again, the rest of it stays

The classic way is fair-esm's own extraction loop: its model, its token batches (4,096 tokens,
sorted by length), float32, one .pt file per protein. Both sides read the same 400 random proteins
(log-normal lengths, median 270, at most 1000) with a 12-layer, 480-wide ESM-2 (the 35M shape). Each
side's batches are dealt into chunks, and the chunks of the sides alternate, in turning order: every
protein is embedded exactly once by each side. Loading the model is not timed. Random reads are of
a store of 20,000 vectors of 1,280 features in ten shards, by position and by id.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from distil_rank.core.records import Record, environment, interval, read_json, write_json
from distil_rank.core.tables import markdown, with_interval
from distil_rank.proteins.batching import Window, batches
from distil_rank.proteins.checkpoints import load_model, save_model
from distil_rank.proteins.command_embed import Config as EmbedConfig
from distil_rank.proteins.command_embed import run as run_embed
from distil_rank.proteins.esm2 import ESM2
from distil_rank.proteins.fasta import AMINO_ACIDS, Protein, clean_proteins, read_fasta, write_fasta
from distil_rank.proteins.pooling import embed_batch
from distil_rank.proteins.pretrain import new_model
from distil_rank.proteins.store import PROVENANCE, EmbeddingStore, new_shard, shard_path
from distil_rank.proteins.store import SCHEMA as STORE
from distil_rank.proteins.store_index import insert, new_index

SCHEMA = "distil-rank/benchmark-embedding/2"
LAYERS, WIDTH, HEADS, BATCH_TOKENS = 12, 480, 20, 4096
READ, READ_WIDTH, READ_SHARDS = 20_000, 1280, 10  # vectors, features and shards to read from


@dataclass(frozen=True)
class Config:
    proteins: int = 400  # random proteins
    chunks: int = 8  # parts that alternate between the sides
    threads: int = 2  # threads of both sides
    seed: int = 0  # of sequences and weights
    parts: tuple[Literal["speed", "memory", "reading"], ...] = ("speed", "memory", "reading")
    out: Path = Path("benchmarks/results/embedding.json")


def random_proteins(count: int, seed: int, sigma: float = 0.6) -> list[Protein]:
    """Proteins of log-normal length (median 270, between 30 and 1000), letters uniform."""
    draw = np.random.default_rng(seed)
    lengths = np.exp(np.log(270) + sigma * draw.standard_normal(count)).clip(30, 1000).astype(int)
    sequences = ("".join(draw.choice(list(AMINO_ACIDS), n)) for n in lengths)
    return [Protein(f"p{i}", f"p{i}", sequence) for i, sequence in enumerate(sequences)]


# the two sides: batches as functions that compute and write, with the residues they hold


class Classic:
    """fair-esm's extraction loop."""

    def __init__(self, checkpoint: Path, fasta: Path, folder: Path) -> None:
        import esm

        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(checkpoint, weights_only=True)
        self.model, alphabet = esm.pretrained.load_model_and_alphabet_core("esm2_random", data)
        self.model.eval()
        start = time.perf_counter()
        dataset = esm.FastaBatchedDataset.from_file(fasta)
        indices = dataset.get_batch_indices(BATCH_TOKENS, extra_toks_per_seq=1)
        self.reading = time.perf_counter() - start
        convert = alphabet.get_batch_converter(1022)
        self.batches = [
            (sum(len(dataset[i][1]) for i in batch), partial(self._batch, convert, dataset, batch))
            for batch in indices
        ]
        self.folder = folder

    def _batch(self, convert: Callable, dataset: Any, batch: list[int]) -> None:
        labels, strings, tokens = convert([dataset[i] for i in batch])
        with torch.no_grad():
            hidden = self.model(tokens, repr_layers=[LAYERS])["representations"][LAYERS]
        for i, (label, sequence) in enumerate(zip(labels, strings)):
            mean = hidden[i, 1 : len(sequence) + 1].mean(0).clone()
            record = {"label": label, "mean_representations": {LAYERS: mean}}
            torch.save(record, self.folder / f"{label}.pt")


class Ours:
    """What `distil-rank embed` does with one shard."""

    def __init__(
        self, checkpoint: Path, fasta: Path, folder: Path, compute: str, opened: ExitStack
    ) -> None:
        self.model: ESM2 = load_model(str(checkpoint), dtype=compute).model
        start = time.perf_counter()
        for _ in range(2):  # the survey before the work, then the work
            proteins = list(clean_proteins(read_fasta(fasta), lambda line: None))
        items = [Window(i, 0, len(p.sequence)) for i, p in enumerate(proteins)]
        grouped = batches(items, BATCH_TOKENS)
        self.reading = time.perf_counter() - start
        self.sequences = [protein.sequence for protein in proteins]
        shard = new_shard(folder / compute, [LAYERS], len(proteins), WIDTH, torch.float32)
        self.write = opened.enter_context(shard)
        self.batches = [
            (sum(w.tokens - 2 for w in batch), partial(self._batch, batch)) for batch in grouped
        ]

    def _batch(self, batch: list[Window]) -> None:
        found = embed_batch(self.model, self.sequences, batch, "mean", (-1,))
        for window, vectors in zip(batch, found):
            self.write(window.protein, vectors)


def timed(side: Classic | Ours, chunk: int, chunks: int) -> tuple[float, int]:
    """Seconds and residues of every `chunks`-th batch."""
    start, residues = time.perf_counter(), 0
    for count, work in side.batches[chunk::chunks]:
        work()
        residues += count
    return time.perf_counter() - start, residues


def speed(config: Config, folder: Path) -> Record:
    """Ratios over all proteins, with those of the chunks."""
    fasta, checkpoint = folder / "proteins.fasta", folder / "model.pt"
    write_fasta(fasta, random_proteins(config.proteins, config.seed))
    save_model(new_model(LAYERS, WIDTH, HEADS, config.seed), checkpoint)
    files = (checkpoint, fasta, folder)
    sides: dict[str, Classic | Ours] = {"classic": Classic(*files)}
    opened = ExitStack()
    sides |= {compute: Ours(*files, compute, opened) for compute in ("float32", "bfloat16")}
    for side in sides.values():
        side.batches[len(side.batches) // 2][1]()  # warm up
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for chunk in range(config.chunks):
        for i in range(3):
            name = list(sides)[(chunk + i) % 3]
            found[name].append(timed(sides[name], chunk, config.chunks))
    opened.close()
    rates = {name: [n / s for s, n in parts] for name, parts in found.items()}
    seconds = {name: side.reading + sum(s for s, _ in found[name]) for name, side in sides.items()}
    ratios = {
        name: [ours / theirs for ours, theirs in zip(rates[name], rates["classic"])]
        for name in ("float32", "bfloat16")
    }
    return {
        "model": f"ESM-2 architecture, {LAYERS} layers x {WIDTH}, random weights",
        "proteins": f"{config.proteins} random ones, lengths log-normal around 270, 30 to 1000",
        "residues": sum(n for _, n in found["classic"]),
        "threads": config.threads,
        "seconds": seconds,
        "speedup": {
            name: interval(seconds["classic"] / seconds[name], min(parts), max(parts), True)
            for name, parts in ratios.items()
        },
        "speedup_note": "seconds of the classic way / ours over all proteins;"
        " low, high: smallest and largest chunk",
    }


def reading(config: Config, folder: Path) -> Record:
    """Microseconds of a random read from a store, by position and by id: median of 20 rounds."""
    store, per = folder / "reading", READ // READ_SHARDS
    store.mkdir()
    rows = torch.randn(1, per, READ_WIDTH, generator=torch.Generator().manual_seed(config.seed))
    with new_index(store) as index:
        for shard in range(READ_SHARDS):
            path = shard_path(store, shard)
            with new_shard(path, [0], per, READ_WIDTH, torch.float32) as write:
                write(0, rows)
            for row in range(per):
                position = shard * per + row
                insert(index, "protein", position, f"p{position}", 100, 1, "", shard, row, "")
    sizes = {"proteins": READ, "rows": READ, "shards": READ_SHARDS, "dim": READ_WIDTH}
    write_json(store / PROVENANCE, {"schema": STORE, "pool": "mean", "layers": [0], **sizes})
    opened, draw = EmbeddingStore(store), np.random.default_rng(config.seed)
    found: Record = {"vectors": READ, "features": READ_WIDTH, "shards": READ_SHARDS}
    for name, key in (("position", int), ("id", "p{}".format)):
        taken = []
        for _ in range(21):
            keys = [key(i) for i in draw.integers(READ, size=1000)]
            start = time.perf_counter()
            for one in keys:
                opened[one]
            taken.append((time.perf_counter() - start) * 1e3)
        found[f"microseconds_by_{name}"] = float(np.median(taken[1:]))  # the first maps the shards
    return found


# memory: the peak of a process of its own


def _peak(work: Callable[[], None], results: Any) -> None:
    work()
    # VmHWM, because ru_maxrss of a child starts at its parent's
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    results.put(peak / 1024)


def peak_mib(work: Callable[[], None]) -> float:
    """Peak resident memory (MiB) of a fresh process that imports this module and does `work`."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_peak, args=(work, results))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"memory measurement ended with exit code {process.exitcode}")
    return results.get()


def nothing() -> None:
    """A process that only imports."""


def one_batch(checkpoint: str) -> None:
    """Load the model and run the largest batch that a run forms: four proteins of 1000 residues."""
    model = load_model(checkpoint).model
    embed_batch(model, ["A" * 1000] * 4, [Window(i, 0, 1000) for i in range(4)], "mean", (-1,))


MEMORY = ("import", "one batch", "large 16", "large 64", "small 1000", "small 10000")


def peak_of(config: Config, folder: Path, name: str) -> float:
    """Peak memory (MiB) of a process that imports, runs one batch, or embeds n proteins."""
    if name == "import":
        return peak_mib(nothing)
    model, _, count = name.partition(" ")
    layers, width, heads = (2, 32, 4) if model == "small" else (LAYERS, WIDTH, HEADS)
    checkpoint, fasta = folder / f"{name}.pt", folder / f"{name}.fasta"
    save_model(new_model(layers, width, heads, config.seed), checkpoint)
    if name == "one batch":
        return peak_mib(partial(one_batch, str(checkpoint)))
    longest = [Protein("longest", "longest", "A" * 1000)] * 8
    write_fasta(fasta, longest + random_proteins(int(count), config.seed + 1))
    task = EmbedConfig(fasta, str(checkpoint), folder / name, shard_residues=16384)
    return peak_mib(partial(run_embed, task))


def memory(config: Config, folder: Path) -> Record:
    """Peaks, and what more proteins add to them."""
    peak = {name: peak_of(config, folder, name) for name in MEMORY}
    batch, run = (peak[name] - peak["import"] for name in ("one batch", "large 64"))
    return {
        "peak_mib": peak,
        "run_over_model_plus_one_batch": run / batch,
        "four_times_the_proteins": peak["large 64"] / peak["large 16"],
        "ten_times_the_proteins": peak["small 10000"] / peak["small 1000"],
    }


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    record: Record = {"schema": SCHEMA, "machine_dependent": ["speed", "memory", "reading"]}
    if len(config.parts) < 3 and config.out.exists():
        record |= read_json(config.out, SCHEMA)
    for part in config.parts:
        measured = {"speed": speed, "memory": memory, "reading": reading}[part]
        with tempfile.TemporaryDirectory() as name:
            record[part] = measured(config, Path(name)) | {"environment": environment()}
        write_json(config.out, record)
        print(part, {key: x for key, x in record[part].items() if key != "environment"})


def table(record: Record) -> str:
    """Speed against fair-esm's loop, peak memory, random reads."""
    speed, memory, reading = (record[part] for part in ("speed", "memory", "reading"))
    rows = [["what", "measured"]]
    for name, ratio in speed["speedup"].items():
        what = f"speed of fair-esm's loop in float32 / ours in {name}, {speed['threads']} threads"
        rows.append([what, f"{with_interval(ratio, '.2f')} x"])
    rows.append(
        ["peak memory of ten times the proteins", f"{memory['ten_times_the_proteins']:.2f} x"]
    )
    for how in ("position", "id"):
        read = reading[f"microseconds_by_{how}"]
        rows.append([f"random read of {reading['features']:,} features by {how}", f"{read:.1f} µs"])
    return markdown(rows)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
