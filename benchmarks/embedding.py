"""Embedding speed and memory: `distil-rank embed` against the classic way, on random weights.

    python -m benchmarks.embedding                   # measures all: results/embedding.json here
    python -m benchmarks.embedding --seconds 150     # stops after that long; run again to go on
    python -m benchmarks.embedding --memory-only     # peak memory again; the timings stay

The classic way is fair-esm's own extraction loop: its model, its token batches (4,096 tokens,
sorted by length), float32, one .pt file per protein. Both sides read the same 400 random proteins
(log-normal lengths, median 270, at most 1000) with a 12-layer, 480-wide ESM-2 (the 35M shape). Each
side's batches are dealt into chunks, and the chunks of the sides alternate, in turning order: every
protein is embedded exactly once by each side. Loading the model is not timed.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

from distil_rank.core.records import config_record, environment, read_json, write_json
from distil_rank.core.resume import Checkpoint
from distil_rank.proteins.batching import Window, batches, padding
from distil_rank.proteins.checkpoints import load_model
from distil_rank.proteins.command_embed import Config as EmbedConfig
from distil_rank.proteins.command_embed import run as run_embed
from distil_rank.proteins.esm2 import ESM2, Attention, _rotation
from distil_rank.proteins.fasta import Protein, clean_proteins, read_fasta, write_fasta
from distil_rank.proteins.pooling import embed_batch
from distil_rank.proteins.store import ShardWriter

SCHEMA = "distil-rank/benchmark-embedding/1"
LAYERS, WIDTH, HEADS, BATCH_TOKENS = 12, 480, 20, 4096
LADDER = (
    "classic",
    "one shard instead of one file per protein",
    "no language-model head",
    "fused attention without averaged weights",
    "fused GELU",
    "our encoder and batches (float32)",
    "bfloat16 matrix products",
)


@dataclass(frozen=True)
class Config:
    proteins: int = 400  # random proteins
    chunks: int = 8  # parts that alternate between the sides
    rounds: int = 1  # of the ladder of single changes, on one chunk
    threads: int = 2  # threads of both sides
    seed: int = 0  # of sequences and weights
    seconds: float = 1e9  # stop after that long and go on in the next call
    memory_only: bool = False  # measure peak memory again, and keep the timings of the record
    out: Path = Path("benchmarks/results/embedding.json")


def random_proteins(count: int, seed: int, sigma: float = 0.6) -> list[Protein]:
    """Proteins of log-normal length (median 270, between 30 and 1000), letters uniform."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(np.exp(np.log(270) + sigma * draw.standard_normal(count)), 30, 1000).astype(
        int
    )
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    return [
        Protein(f"p{i}", f"p{i}", "".join(draw.choice(letters, n))) for i, n in enumerate(lengths)
    ]


def write_checkpoint(path: Path, layers: int, width: int, heads: int, seed: int) -> None:
    """Random weights in fair-esm's format."""
    from esm.model.esm2 import ESM2 as FairESM2

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FairESM2(layers, width, heads)
    settings = {
        "encoder_layers": layers,
        "encoder_embed_dim": width,
        "encoder_attention_heads": heads,
    }
    names = {
        key: ("encoder." if key.startswith("lm_head") else "encoder.sentence_encoder.") + key
        for key in model.state_dict()
    }
    state = {
        names[key]: tensor
        for key, tensor in model.state_dict().items()
        if not key.startswith("contact_head")
    }
    torch.save(
        {"cfg": {"model": argparse.Namespace(**settings, token_dropout=True)}, "model": state}, path
    )


# the two sides: batches as functions that compute and write, with the residues they hold


class Classic:
    """fair-esm's extraction loop, with one thing after the other replaced (`step` of LADDER)."""

    def __init__(self, checkpoint: Path, fasta: Path, folder: Path, step: int = 0) -> None:
        import esm

        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(checkpoint, weights_only=True)
        self.model, alphabet = esm.pretrained.load_model_and_alphabet_core("esm2_random", data)
        self.model.eval()
        self.gelu: Callable = F.gelu if step >= 4 else esm.modules.gelu
        self.esm_modules = esm.modules
        if step >= 2:
            self.model.lm_head = nn.Identity()
        if step >= 3:
            for layer in self.model.layers:
                layer.self_attn = _FusedAttention(layer.self_attn)
        start = time.perf_counter()
        dataset = esm.FastaBatchedDataset.from_file(fasta)
        indices = dataset.get_batch_indices(BATCH_TOKENS, extra_toks_per_seq=1)
        self.reading = time.perf_counter() - start
        convert = alphabet.get_batch_converter(1022)
        self.batches = [
            (sum(len(dataset[i][1]) for i in batch), partial(self._batch, convert, dataset, batch))
            for batch in indices
        ]
        lengths = [[len(dataset[i][1]) + 2 for i in batch] for batch in indices]
        self.padding = 1 - sum(map(sum, lengths)) / sum(
            max(batch) * len(batch) for batch in lengths
        )
        self.folder = folder
        self.writer = (
            ShardWriter(
                folder / "classic.safetensors", [LAYERS], len(dataset), WIDTH, torch.float32
            )
            if step
            else None
        )

    def _batch(self, convert: Callable, dataset: Any, batch: list[int]) -> None:
        original, self.esm_modules.gelu = self.esm_modules.gelu, self.gelu
        labels, strings, tokens = convert([dataset[i] for i in batch])
        with torch.no_grad():
            hidden = self.model(tokens, repr_layers=[LAYERS])["representations"][LAYERS]
        for i, (label, sequence) in enumerate(zip(labels, strings)):
            mean = hidden[i, 1 : len(sequence) + 1].mean(0).clone()
            if self.writer is None:
                torch.save(
                    {"label": label, "mean_representations": {LAYERS: mean}},
                    self.folder / f"{label}.pt",
                )
            else:
                self.writer.write(batch[i], mean[None, None])
        self.esm_modules.gelu = original


class _FusedAttention(nn.Module):
    """Our attention in the place of fair-esm's, in its (l, n, d) layout."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.ours = Attention(WIDTH, HEADS)
        self.ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "proj" in k})

    def forward(
        self, query: torch.Tensor, key_padding_mask: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        rotation = _rotation(query.shape[0], WIDTH // HEADS, query.device)
        return self.ours(query.transpose(0, 1), mask, rotation).transpose(0, 1), None


class Ours:
    """What `distil-rank embed` does with one shard."""

    def __init__(self, checkpoint: Path, fasta: Path, folder: Path, compute: str) -> None:
        self.model: ESM2 = load_model(str(checkpoint), dtype=compute).model
        start = time.perf_counter()
        for _ in range(2):  # the survey before the work, then the work
            proteins = list(clean_proteins(read_fasta(fasta), lambda line: None))
        grouped = batches(
            [Window(i, 0, len(p.sequence)) for i, p in enumerate(proteins)], BATCH_TOKENS
        )
        self.reading = time.perf_counter() - start
        self.padding = padding(grouped)
        self.sequences = [protein.sequence for protein in proteins]
        self.writer = ShardWriter(
            folder / f"{compute}.safetensors", [LAYERS], len(proteins), WIDTH, torch.float32
        )
        self.batches = [
            (sum(w.tokens - 2 for w in batch), partial(self._batch, batch)) for batch in grouped
        ]

    def _batch(self, batch: list[Window]) -> None:
        for window, vectors in zip(
            batch, embed_batch(self.model, self.sequences, batch, "mean", (-1,))
        ):
            self.writer.write(window.protein, vectors)


def timed(side: Classic | Ours, chunk: int, chunks: int) -> dict[str, float]:
    """Seconds and residues of every `chunks`-th batch."""
    start, residues = time.perf_counter(), 0
    for count, work in side.batches[chunk::chunks]:
        work()
        residues += count
    return {"seconds": time.perf_counter() - start, "residues": residues}


def jobs(config: Config) -> Iterator[tuple[str, int]]:
    """What is timed, in order: (side or ladder step, chunk or round)."""
    sides = ["classic", "float32", "bfloat16"]
    for chunk in range(config.chunks):
        for i in range(3):
            yield sides[(chunk + i) % 3], chunk
    for round in range(config.rounds):
        for step in LADDER:
            yield f"ladder: {step}", round
    for number in range(len(MEMORY)):
        yield "memory", number


def measure(
    config: Config, folder: Path, done: dict[str, dict[str, float]], save: Callable[[], None]
) -> bool:
    """Time the jobs that are not in `done` until the seconds are over; whether all are done."""
    start = time.perf_counter()
    fasta, checkpoint = folder / "proteins.fasta", folder / "model.pt"
    write_fasta(fasta, random_proteins(config.proteins, config.seed))
    write_checkpoint(checkpoint, LAYERS, WIDTH, HEADS, config.seed)
    made: dict[str, Classic | Ours] = {}

    def side(name: str) -> Classic | Ours:
        if name not in made:
            step = LADDER.index(name) if name in LADDER else 0
            if name in ("float32", LADDER[5], "bfloat16", LADDER[6]):
                made[name] = Ours(
                    checkpoint,
                    fasta,
                    folder,
                    "bfloat16" if name in ("bfloat16", LADDER[6]) else "float32",
                )
            else:
                made[name] = Classic(checkpoint, fasta, folder, step)
            made[name].batches[len(made[name].batches) // 2][1]()  # warm up
        return made[name]

    for name, number in jobs(config):
        key = f"{name} {number}"
        if key in done:
            continue
        if time.perf_counter() - start > config.seconds:
            return False
        if name == "memory":
            done[key] = {"mib": memory(config, folder, MEMORY[number])}
        else:
            current = side(name.removeprefix("ladder: "))
            done[key] = timed(current, 0 if name.startswith("ladder") else number, config.chunks)
            done[key] |= {"reading": current.reading, "padding": current.padding}
        save()
    return True


# memory: the peak of a process of its own


def _peak(work: Callable[[], None], results: Any) -> None:
    work()
    # VmHWM, because ru_maxrss of a child starts at its parent's
    with open("/proc/self/status") as status:
        results.put(
            next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
        )


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


def memory(config: Config, folder: Path, name: str) -> float:
    """Peak memory (MiB) of a process that imports, runs one batch, or embeds n proteins."""
    if name == "import":
        return peak_mib(nothing)
    model, _, count = name.partition(" ")
    layers, width, heads = (2, 32, 4) if model == "small" else (LAYERS, WIDTH, HEADS)
    write_checkpoint(folder / f"{name}.pt", layers, width, heads, config.seed)
    if name == "one batch":
        return peak_mib(partial(one_batch, str(folder / f"{name}.pt")))
    proteins = [Protein("longest", "longest", "A" * 1000)] * 8 + random_proteins(
        int(count), config.seed + 1
    )
    write_fasta(folder / f"{name}.fasta", proteins)
    task = EmbedConfig(
        folder / f"{name}.fasta", str(folder / f"{name}.pt"), folder / name, shard_residues=16384
    )
    return peak_mib(partial(run_embed, task))


def summary(config: Config, done: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Ratios of whole runs, with those of chunks; what each change gives; padding; memory."""

    def rate(name: str, number: int) -> float:
        return done[f"{name} {number}"]["residues"] / done[f"{name} {number}"]["seconds"]

    def total(name: str) -> float:
        return done[f"{name} 0"]["reading"] + sum(
            done[f"{name} {chunk}"]["seconds"] for chunk in range(config.chunks)
        )

    speedup = {}
    for name in ("float32", "bfloat16"):
        ratios = [rate(name, chunk) / rate("classic", chunk) for chunk in range(config.chunks)]
        speedup[name] = {
            "value": total("classic") / total(name),
            "low": min(ratios),
            "high": max(ratios),
            "higher_is_better": True,
        }
    steps = [
        {
            "change": step,
            "residues_per_second": float(
                np.median([rate(f"ladder: {step}", i) for i in range(config.rounds)])
            ),
        }
        for step in LADDER
    ]
    for before, after in zip([steps[0], *steps], steps):
        after["factor"] = after["residues_per_second"] / before["residues_per_second"]
    return {
        "schema": SCHEMA,
        "config": {
            key: value
            for key, value in config_record(config).items()
            if key not in ("seconds", "memory_only", "out")
        },
        "data": {
            "source": "random proteins, log-normal lengths (median 270, sigma 0.6, 30 to 1000),"
            " random weights",
            "model": f"ESM-2 architecture, {LAYERS} layers x {WIDTH}",
            "n": config.proteins,
            "residues": int(
                sum(done[f"classic {chunk}"]["residues"] for chunk in range(config.chunks))
            ),
        },
        "speedup": speedup,
        "speedup_note": "value: seconds of the classic way / ours over all proteins;"
        " low, high: smallest and largest chunk",
        "seconds": {name: total(name) for name in ("classic", "float32", "bfloat16")},
        "ladder": steps,
        "padding": {name: done[f"{name} 0"]["padding"] for name in ("classic", "float32")},
        "memory": memory_summary(
            {name: done[f"memory {number}"]["mib"] for number, name in enumerate(MEMORY)}
        ),
        "environment": {**environment(), "threads": config.threads},
        "machine_dependent": ["speedup", "seconds", "ladder", "memory"],
    }


def memory_summary(peak: dict[str, float]) -> dict[str, Any]:
    return {
        "peak_mib": peak,
        "run_over_model_plus_one_batch": (peak["large 64"] - peak["import"])
        / (peak["one batch"] - peak["import"]),
        "four_times_the_proteins": peak["large 64"] / peak["large 16"],
        "ten_times_the_proteins": peak["small 10000"] / peak["small 1000"],
        "environment": environment(),
    }


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    if config.memory_only:
        record = read_json(config.out, SCHEMA)
        with tempfile.TemporaryDirectory() as name:
            record["memory"] = memory_summary(
                {part: memory(config, Path(name), part) for part in MEMORY}
            )
        write_json(config.out, record)
        print(json.dumps(record["memory"], indent=1))
        return
    asked = replace(config, seconds=0, out=Path())
    progress = Checkpoint(config.out.with_suffix(".state"), SCHEMA, asked)
    done: dict[str, dict[str, float]] = progress.load() or {}
    with tempfile.TemporaryDirectory() as name:
        complete = measure(config, Path(name), done, lambda: progress.save(done))
        if not complete:
            print(f"{len(done)} of {len(list(jobs(config)))} timings; run again to go on")
            return
    record = summary(config, done)
    write_json(config.out, record)
    progress.clear()
    for name, ratio in record["speedup"].items():
        print(
            f"{name}: {ratio['value']:.2f} times the classic way"
            f" (chunks {ratio['low']:.2f} to {ratio['high']:.2f})"
        )
    print(f"{config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
