"""The bars of the certified core, measured against the obvious alternative in one run.

python -m benchmarks.lowrank                        # everything, about four minutes on two cores
python -m benchmarks.lowrank --only latency speed   # some of it; the other figures stay

Writes benchmarks/results/lowrank.json and prints it as a table.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional as F

from benchmarks.tables_experiment import BARS, bars
from distil_rank import LowRankLinear, Moments, compress_linear
from distil_rank.core.errors import one_line_errors
from distil_rank.core.latency import compare_latency
from distil_rank.core.records import ROOT, Record, environment, read_json, write_json

OUT = ROOT / "benchmarks" / "results" / "lowrank.json"
DIM, RANK, ROWS = 1280, 64, 10_000


def difficult(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows x (n, d) with n > d, by what makes them difficult."""
    d = x.shape[1]
    constant, scaled = x.clone(), x.clone()
    constant[:, ::3] = 7.0
    scaled[:, ::4] *= 1e4
    return {
        "plain": x,
        "n < d": x[: d // 2],
        "n = d": x[:d],
        "one null direction": x - x.mean(1, keepdim=True),  # as after LayerNorm
        "duplicated rows": x[: d // 3].repeat(5, 1),
        "constant features": constant,
        "features scaled by 1e4": scaled,
    }


def exactness() -> Record:
    """Gap between the achieved loss, measured by running both layers, and the floor, over it.

    Where the floor is 0 (rank above the number of independent rows) the gap is relative to the
    output's variance.
    """
    g, worst = torch.Generator().manual_seed(3), {}
    mixing = torch.randn(90, 24, generator=g, dtype=torch.float64)
    plain = mixing @ torch.randn(24, 24, generator=g, dtype=torch.float64) + 4
    for kind, x in difficult(plain).items():
        gaps = []
        for d_out in (10, 24, 40):
            teacher = nn.Linear(24, d_out, dtype=torch.float64)
            y = teacher(x).detach()
            eigenvalues = torch.linalg.svdvals(y - y.mean(0)).square() / len(x)
            variance = float(eigenvalues.sum())
            for rank in (1, 4, 9):
                student, _ = compress_linear(teacher, Moments.of(x), rank=rank)
                floor = float(eigenvalues[rank:].sum())
                achieved = float((student(x).detach() - y).square().sum(1).mean())
                unit = floor if floor > 1e-12 * variance else variance
                gaps.append(abs(achieved - floor) / unit)
        worst[kind] = max(gaps)
    shapes = "24 -> 10, 24, 40; ranks 1, 4, 9; float64"
    return {"largest_relative_gap": worst, "bar": 1e-9, "shapes": shapes}


def plain_distillation(x: torch.Tensor, steps: int) -> None:
    """The usual loop: one student, the teacher evaluated in every step."""
    teacher = nn.Linear(DIM, DIM)
    student = nn.Sequential(nn.Linear(DIM, RANK, bias=False), nn.Linear(RANK, DIM))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (64,))]
        with torch.no_grad():
            target = teacher(batch)
        output = student(batch)
        cosine = F.cosine_similarity(output, target, dim=-1)
        loss = F.mse_loss(output, target) + 0.1 * (1 - cosine).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speed() -> Record:
    """compress_linear against 1000 plain distillation steps, interleaved, medians of 5."""
    x, teacher = torch.randn(ROWS, DIM) + 1, nn.Linear(DIM, DIM)
    moments = Moments.of(x)
    compress_linear(teacher, moments, rank=RANK)  # warm-up
    plain_distillation(x, 20)
    calls = (
        lambda: plain_distillation(x, 1000),
        lambda: compress_linear(teacher, Moments.of(x), rank=RANK),
        lambda: compress_linear(teacher, moments, rank=RANK),
    )
    rows = np.array([[seconds(call) for call in calls] for _ in range(5)])
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


def latency() -> Record:
    """Share of the FLOP bound on one thread in float32, in steady use."""
    x = torch.randn(512, DIM)
    student = LowRankLinear(torch.randn(RANK, DIM), torch.randn(DIM, RANK), torch.randn(DIM))
    rows = compare_latency(nn.Linear(DIM, DIM), student, [x[:1], x[:32], x])
    return {"rows": rows, "bars": {"batch 32": 0.85, "batch 512": 0.92}}


# VmHWM, because ru_maxrss of a child starts at its parent's
MEMORY = f"""
import torch
from distil_rank import Moments
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
g = torch.Generator().manual_seed(0)
before = peak()
moments = Moments({DIM})
for _ in range(250):
    moments.update(torch.randn(4000, {DIM}, generator=g))
print(peak() - before, moments.count)
"""


def memory() -> Record:
    """Peak memory of moments over a stream of 1,000,000 x 1280 rows, above torch itself."""
    start = time.perf_counter()
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, count = map(float, done.stdout.split())
    taken = time.perf_counter() - start
    return {"rows": int(count), "peak_mb": peak, "bar_mb": 400, "seconds": taken}


def whole() -> Record:
    """`python main.py --synthetic`, 1280 wide, against three plain students one after the other."""
    x = torch.randn(4000, DIM)
    plain_distillation(x, 20)
    plain = sum(seconds(lambda: plain_distillation(x, 1000)) for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main.py", "--synthetic", "--out", folder]
        ours = seconds(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True))
    return {"three_plain_students_s": plain, "main_s": ours, "ratio": ours / plain, "bar": 2}


def many_rows(rows: int = 100_000) -> Record:
    """Peak memory of `python main.py` on many rows of 1280 features, all seeds, few steps."""
    g = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, n in (("train", rows), ("val", 1000)):
            parts = [torch.randn(1000, DIM, generator=g).half() for _ in range(n // 1000)]
            x = torch.cat(parts)
            np.save(f"{folder}/{name}.npy", x.numpy())
        paths = ["--train", f"{folder}/train.npy", "--val", f"{folder}/val.npy", "--out", folder]
        command = [sys.executable, "main.py", *paths, "--steps", "10"]
        taken = seconds(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # kilobytes on Linux
    return {"rows": rows, "peak_gb": peak, "bar_gb": 4, "seconds": taken}


SECTIONS: dict[str, Callable[[], Record]] = {
    section.__name__: section for section in (exactness, speed, latency, memory, whole, many_rows)
}


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()  # which of exactness, speed, latency, memory, whole, many_rows
    out: Path = OUT  # record to write or renew


def main(config: Config) -> None:
    record: Record = read_json(config.out, BARS) if config.out.exists() else {"schema": BARS}
    for name in config.only or SECTIONS:
        record[name] = SECTIONS[name]() | {"environment": environment()}
        write_json(config.out, record)
    print(bars(record))


if __name__ == "__main__":
    with one_line_errors("benchmarks.lowrank"):
        main(tyro.cli(Config, prog="python -m benchmarks.lowrank", description=__doc__))
