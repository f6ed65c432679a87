"""The bars of the certified core, measured against the obvious alternative in one run.

    python -m benchmarks.lowrank                        # everything, about four minutes on two cores
    python -m benchmarks.lowrank --only latency speed   # some of it; the other figures stay

Writes benchmarks/results/lowrank.json and prints it as tables.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional as F

from distil_rank import LowRankLinear, Moments, compress_linear
from distil_rank.core.errors import one_line_errors
from distil_rank.core.latency import compare_latency
from distil_rank.experiment.tables import BARS_SCHEMA, bars
from distil_rank.core.records import ROOT, environment, read_json, write_json
from tests.compress.test_lowrank import KINDS, inputs

OUT = ROOT / "benchmarks" / "results" / "lowrank.json"
DIM, RANK, ROWS = 1280, 64, 10_000


def exactness() -> dict[str, Any]:
    """Gap between the achieved loss, measured by running both layers, and the floor, relative to the floor.

    Where the floor is 0 (rank above the number of independent rows) the gap is relative to the output's variance.
    """
    worst = {}
    for kind in KINDS:
        gaps = []
        for d_out in (10, 24, 40):
            teacher = nn.Linear(24, d_out, dtype=torch.float64)
            x = inputs(kind)
            y = teacher(x).detach()
            eigenvalues = torch.linalg.svdvals(y - y.mean(0)).square() / len(x)
            variance = float(eigenvalues.sum())
            for rank in (1, 4, 9):
                student, _ = compress_linear(teacher, Moments.of(x), rank=rank)
                floor = float(eigenvalues[rank:].sum())
                achieved = float((student(x).detach() - y).square().sum(1).mean())
                gaps.append(abs(achieved - floor) / (floor if floor > 1e-12 * variance else variance))
        worst[kind] = max(gaps)
    return {"largest_relative_gap": worst, "bar": 1e-9, "shapes": "24 -> 10, 24, 40; ranks 1, 4, 9; float64"}


def plain_distillation(x: torch.Tensor, steps: int) -> None:
    """The usual loop: one student, the teacher evaluated in every step."""
    teacher = nn.Linear(DIM, DIM)
    student = nn.Sequential(nn.Linear(DIM, RANK, bias=False), nn.Linear(RANK, DIM))
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (64,))]
        with torch.no_grad():
            target = teacher(batch)
        output = student(batch)
        loss = F.mse_loss(output, target) + 0.1 * (1 - F.cosine_similarity(output, target, dim=-1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speed() -> dict[str, Any]:
    """compress_linear against 1000 plain distillation steps, interleaved, medians of 5."""
    x, teacher = torch.randn(ROWS, DIM) + 1, nn.Linear(DIM, DIM)
    moments = Moments.of(x)
    compress_linear(teacher, moments, rank=RANK)  # warm-up
    plain_distillation(x, 20)
    rows = np.array(
        [
            [
                seconds(lambda: plain_distillation(x, 1000)),
                seconds(lambda: compress_linear(teacher, Moments.of(x), rank=RANK)),
                seconds(lambda: compress_linear(teacher, moments, rank=RANK)),
            ]
            for _ in range(5)
        ]
    )
    plain, whole, ready = np.median(rows, axis=0)
    return {
        "plain_1000_steps_s": plain,
        "compress_from_rows_s": whole,
        "compress_from_moments_s": ready,
        "ratio_from_rows": float(np.median(rows[:, 0] / rows[:, 1])),
        "ratio_from_moments": float(np.median(rows[:, 0] / rows[:, 2])),
        "bars": {"ratio_from_rows": 5, "ratio_from_moments": 10},
        "shape": f"{DIM} x {DIM} -> rank {RANK}, {ROWS} rows",
    }


def latency() -> dict[str, Any]:
    """Share of the FLOP bound on one thread in float32, in steady use."""
    x = torch.randn(512, DIM)
    student = LowRankLinear(torch.randn(RANK, DIM), torch.randn(DIM, RANK), torch.randn(DIM))
    batches = [x[:1], x[:32], x]
    return {
        "rows": compare_latency(nn.Linear(DIM, DIM), student, batches),
        "bars": {"batch 32": 0.85, "batch 512": 0.92},
    }


# VmHWM, because ru_maxrss of a child starts at its parent's
MEMORY = f"""
import torch
from distil_rank import Moments
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
g = torch.Generator().manual_seed(0)
before = peak()
moments = Moments({DIM})
for _ in range(250):
    moments.update(torch.randn(4000, {DIM}, generator=g))
print(peak() - before, moments.count)
"""


def memory() -> dict[str, Any]:
    """Peak memory of moments over a stream of 1,000,000 x 1280 rows above the interpreter with torch loaded."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, count = map(float, done.stdout.split())
    return {"rows": int(count), "peak_mb": peak, "bar_mb": 400, "seconds": time.perf_counter() - start}


def whole() -> dict[str, Any]:
    """`python main.py --synthetic`, the 1280-wide default, against three plain students one after the other."""
    x = torch.randn(4000, DIM)
    plain_distillation(x, 20)
    plain = seconds(lambda: [plain_distillation(x, 1000) for _ in range(3)])
    command = [sys.executable, "main.py", "--synthetic", "--out", "results/benchmark.tmp"]
    try:
        ours = seconds(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True))
    finally:
        for path in (ROOT / "results" / "benchmark.tmp").glob("*"):
            path.unlink()
        (ROOT / "results" / "benchmark.tmp").rmdir()
    return {"three_plain_students_s": plain, "main_s": ours, "ratio": ours / plain, "bar": 2}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {f.__name__: f for f in (exactness, speed, latency, memory, whole)}


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()  # which of exactness, speed, latency, memory, whole; default: all
    out: Path = OUT  # record to write or renew


def main(config: Config) -> None:
    record = read_json(config.out, BARS_SCHEMA) if config.out.exists() else {"schema": BARS_SCHEMA}
    for name in config.only or SECTIONS:
        record[name] = SECTIONS[name]() | {"environment": environment()}
        write_json(config.out, record)
    print(bars(record))


if __name__ == "__main__":
    with one_line_errors("benchmarks.lowrank"):
        main(tyro.cli(Config, prog="python -m benchmarks.lowrank", description=__doc__))
