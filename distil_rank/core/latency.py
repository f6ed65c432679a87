"""How much faster: teacher and student timed in turn, in one mode, with fixed threads.

The FLOP bound stands beside every speed-up.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.core.devices import threads

SAMPLE_MS = 20.0  # in 5 ms the first, cold call still costs a batch of 512 five per cent


class Quartiles(TypedDict):
    """Median and quartiles of a repeated measurement."""

    q25: float
    median: float
    q75: float
    higher_is_better: bool


class Latency(TypedDict):
    """Times of teacher and student on one batch in one mode, in milliseconds."""

    batch: int
    mode: str
    threads: int
    rounds: int
    teacher_ms: Quartiles
    student_ms: Quartiles
    speedup: Quartiles
    flop_bound: float
    fraction_of_bound: float


def parameters(module: nn.Module) -> int:
    """Number of parameters; of a linear layer also its multiply-adds for one row, bias included."""
    return sum(p.numel() for p in module.parameters())


def compare_latency(
    teacher: nn.Module, student: nn.Module, inputs: list[Tensor], rounds: int = 50
) -> list[Latency]:
    """Time both in `rounds` interleaved pairs on each x (batch, d_in); one record a batch and mode.

    On one thread. Modes: eager and, on CUDA, a replayed graph. A sample is as many calls as fill
    SAMPLE_MS, so that each side finds its own weights in the cache, as in steady use; the speed-up
    is the median of the ratios of neighboring samples.
    """
    bound = parameters(teacher) / parameters(student)
    records = []
    with torch.inference_mode(), threads(1):
        for x, mode in product(inputs, ["eager", "cuda graph"] if inputs[0].is_cuda else ["eager"]):
            wrap = cuda_graph if mode == "cuda graph" else partial
            samples = interleaved([wrap(module, x) for module in (teacher, student)], x, rounds)
            speedup = quartiles(samples[:, 0] / samples[:, 1], True)
            record = Latency(
                batch=len(x),
                mode=mode,
                threads=1,
                rounds=rounds,
                teacher_ms=quartiles(samples[:, 0], False),
                student_ms=quartiles(samples[:, 1], False),
                speedup=speedup,
                flop_bound=bound,
                fraction_of_bound=speedup["median"] / bound,
            )
            records.append(record)
    return records


def interleaved(calls: list[Callable[[], object]], x: Tensor, rounds: int) -> np.ndarray:
    """Milliseconds of each call, measured in turn (rounds, calls), after a warm-up."""
    clock = cuda_sample if x.is_cuda else cpu_sample
    for call in calls:
        clock(call, 10)
    repeats = [max(1, round(SAMPLE_MS / clock(call, 5))) for call in calls]
    return np.array([[clock(c, r) for c, r in zip(calls, repeats)] for _ in range(rounds)])


def quartiles(values: np.ndarray, higher_is_better: bool) -> Quartiles:
    q25, median, q75 = map(float, np.percentile(values, [25, 50, 75]))
    return Quartiles(q25=q25, median=median, q75=q75, higher_is_better=higher_is_better)


def cpu_sample(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one call, averaged over `repeats` calls in a row."""
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) / repeats / 1e6


def cuda_sample(call: Callable[[], object], repeats: int) -> float:
    """The same on the GPU's own clock."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats


def cuda_graph(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """The call captured once and replayed without launch overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(x)
    return graph.replay
