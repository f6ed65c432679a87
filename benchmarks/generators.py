"""The generators' bars: loss at ProtGPT2's vocabulary, calibration intervals, preparing proteins.

python -m benchmarks.generators
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro

from benchmarks.tables_generators import SCHEMA
from distil_rank.core.errors import one_line_errors
from distil_rank.core.records import (
    Record,
    config_record,
    environment,
    require_writable,
    write_json,
)
from distil_rank.generators import quality
from distil_rank.generators.calibration import calibration
from distil_rank.generators.loss import CHUNK, Hidden, Objective, distillation_sums
from distil_rank.generators.prepared import Prepared

VOCABULARY = 50257  # of ProtGPT2


@dataclass(frozen=True)
class Config:
    out: Path = Path("benchmarks/results/generators.json")  # where to write
    rounds: int = 5  # of the loss, interleaved
    proteins: int = 600_000  # that are prepared
    trials: int = 1000  # of each simulated calibration


def direct(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The plain objective as anyone would write it."""
    log_q = torch.log_softmax(student[:, :-1] / 2, dim=-1)
    p = torch.softmax(teacher[:, :-1] / 2, dim=-1)
    soft = (p * (torch.log(p + 1e-10) - log_q)).sum(-1).mean()
    hard = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return 0.5 * hard + 0.5 * 4 * soft


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes held at once of those that torch allocates while `function` runs."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def loss_at_full_vocabulary(rounds: int) -> Record:
    """2 x 256 tokens at ProtGPT2's vocabulary: memory beside the logits, time, difference."""
    g = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(2, 256, VOCABULARY, generator=g)).requires_grad_()
    teacher = 3 * torch.randn(2, 256, VOCABULARY, generator=g)
    tokens = torch.randint(VOCABULARY, (2, 256), generator=g)
    mask = torch.ones_like(tokens)

    def ours() -> torch.Tensor:
        sums = distillation_sums(student, teacher, tokens, mask, Objective())
        return sums.loss / sums.n

    def backward(loss: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        student.grad = None
        value = loss()
        value.backward()
        assert student.grad is not None
        return value.item(), student.grad

    variants = {"direct": lambda: direct(student, teacher, tokens), "ours": ours}
    peaks = {}
    for name, f in variants.items():
        student.grad = None
        peaks[name] = peak_bytes(lambda f=f: backward(f))  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(rounds + 1):
        for name, f in variants.items():
            start = time.process_time()
            backward(f)
            if repeat:
                seconds[name].append(time.process_time() - start)
    value, gradient = backward(variants["direct"])
    wanted = gradient.clone()
    own, gradient = backward(ours)
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        "vocabulary": VOCABULARY,
        "positions_at_a_time": CHUNK // VOCABULARY,
        "memory_ratio": peaks["ours"] / peaks["direct"],
        "time_ratio": middle["ours"] / middle["direct"],
        "peak_mib": {name: p / 2**20 for name, p in peaks.items()},
        "processor_seconds": middle,
        "value_difference": abs(own - value),
        "largest_gradient_difference": float((gradient - wanted).abs().max()),
    }


def coverage(trials: int) -> list[Record]:
    """Simulated models whose confidence is too high by a known gap: how often intervals hold it."""
    rows = []
    for n in (2000, 20000):
        for gap in (0.0, 0.005, 0.01, 0.02, 0.04):
            found = []
            for trial in range(trials):
                rng = np.random.default_rng([n, trial])
                confidence = 0.08 + 0.9 * rng.beta(1.0, 4.0, n)
                correct = (rng.random(n) < confidence - gap).astype(float)
                found.append(calibration(confidence, correct, np.arange(n) // 20)["error"])
            covered = np.mean([f["low"] <= gap <= f["high"] for f in found])
            values = [f["value"] for f in found]
            row = {"tokens": n, "gap": gap, "trials": trials, "covered": float(covered)}
            rows.append(row | {"mean": float(np.mean(values)), "deviation": float(np.std(values))})
    return rows


def novelty_of_copies() -> Record:
    """200 copies of 70 residues against 1,000 proteins with controls, and processor seconds."""
    rng = np.random.default_rng(0)
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    made = ["".join(rng.choice(letters, rng.integers(80, 300))) for _ in range(1200)]
    copies = [s[5:75] for s in made[200:400]]
    start = time.process_time()
    quality.nearest_identity(made[:200], made[200:])
    seconds = time.process_time() - start
    return {**quality.novelty(copies, made[:200], made[200:]), "processor_seconds": seconds}


def preparation(proteins: int) -> Record:
    """Time and memory of `generator prepare` on random proteins, in a process of its own."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    with TemporaryDirectory() as folder:
        fasta = Path(folder) / "proteins.fasta"
        with fasta.open("wb") as file:
            for i, length in enumerate(rng.integers(50, 600, proteins)):
                file.write(b">%d\n%s\n" % (i, rng.choice(letters, length).tobytes()))
        command = ["-m", "distil_rank", "generator", "prepare", str(fasta), "--split-by", "random"]
        command += ["--context", "640", "--out", f"{folder}/shards"]
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        opened = time.perf_counter()
        tokens = len(Prepared(f"{folder}/shards").part("train").tokens)
        opened = time.perf_counter() - opened
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "proteins": proteins,
        "tokens": tokens,
        "seconds": seconds,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "seconds_to_open": opened,
        "minutes_for_6_million": seconds / 60 * 6e6 / proteins,
    }


def states_and_logits(width: int = 256) -> Record:
    """Peak of loss and gradients at V = 50,257 from states, over that with all logits held."""
    g = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 256, width, generator=g) for _ in range(2)]
    weights = [torch.randn(VOCABULARY, width, generator=g) / 16 for _ in range(2)]
    tokens = torch.randint(VOCABULARY, (2, 256), generator=g)
    mask, own = torch.ones_like(tokens), [states[0].requires_grad_(), weights[0].requires_grad_()]

    def peak(whole: bool) -> int:
        def once() -> None:
            pair = [Hidden(h, w) for h, w in zip(states, weights)]
            given = [h @ w.T for h, w in zip(states, weights)] if whole else pair
            loss = distillation_sums(given[0], given[1], tokens, mask, Objective()).loss
            torch.autograd.grad(loss, own)

        return peak_bytes(once)

    whole, chunked = peak(True), peak(False)
    mib = {"logits": whole / 2**20, "states": chunked / 2**20}
    return {"width": width, "memory_ratio": chunked / whole, "peak_mib": mib}


def run(config: Config) -> None:
    require_writable(config.out.parent)
    prepared = preparation(config.proteins)  # first: a child's peak counts what its parent held
    record: Record = {
        "schema": SCHEMA,
        "config": config_record(config),
        "loss": loss_at_full_vocabulary(config.rounds),
        "calibration": coverage(config.trials),
        "novelty": novelty_of_copies(),
        "states": states_and_logits(),
        "prepare": prepared,
        "environment": environment(),
        "machine_dependent": [
            "loss.time_ratio",
            "loss.processor_seconds",
            "novelty.processor_seconds",
            "prepare",
        ],
    }
    write_json(config.out, record)
    for name in ("loss", "calibration", "novelty", "states", "prepare"):
        print(name, record[name])


if __name__ == "__main__":
    with one_line_errors("benchmarks.generators"):
        run(tyro.cli(Config, description=__doc__))
