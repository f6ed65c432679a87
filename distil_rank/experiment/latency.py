"""How much faster: teacher and student timed in turn, in one mode, with fixed threads; the FLOP bound beside it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

SAMPLE_MS = 20.0  # in 5 ms the first, cold call still costs a batch of 512 five per cent


def parameters(module: nn.Module) -> int:
    """Number of parameters; of a linear layer also its multiply-adds for one row, each bias counted as one."""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A fixed number of torch threads, then the previous one again."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare_latency(
    teacher: nn.Module, student: nn.Module, inputs: list[Tensor], rounds: int = 50, thread_count: int = 1
) -> list[dict[str, object]]:
    """Time both in `rounds` interleaved pairs on each x (batch, d_in); one record a batch and mode, in milliseconds.

    Modes: eager and, on CUDA, a replayed graph. A sample is as many calls as fill SAMPLE_MS, so that each side finds its
    own weights in the cache, as in steady use; the speed-up is the median of the ratios of neighbouring samples.
    """
    bound = parameters(teacher) / parameters(student)
    records = []
    with torch.inference_mode(), threads(thread_count):
        for x, mode in product(inputs, ["eager", "cuda graph"] if inputs[0].is_cuda else ["eager"]):
            calls = [cuda_graph(m, x) if mode == "cuda graph" else partial(m, x) for m in (teacher, student)]
            clock = cuda_sample if x.is_cuda else cpu_sample
            for call in calls:  # warm-up
                clock(call, 10)
            repeats = [max(1, round(SAMPLE_MS / clock(call, 5))) for call in calls]
            samples = np.array([[clock(call, r) for call, r in zip(calls, repeats)] for _ in range(rounds)])
            bounds = np.percentile(samples, [25, 50, 75], axis=0)
            speedup = quartiles(np.percentile(samples[:, 0] / samples[:, 1], [25, 50, 75]))
            records.append(
                {
                    "batch": len(x),
                    "mode": mode,
                    "threads": thread_count,
                    "rounds": rounds,
                    "teacher_ms": quartiles(bounds[:, 0]) | {"higher_is_better": False},
                    "student_ms": quartiles(bounds[:, 1]) | {"higher_is_better": False},
                    "speedup": speedup | {"higher_is_better": True},
                    "flop_bound": bound,
                    "fraction_of_bound": speedup["median"] / bound,
                }
            )
    return records


def quartiles(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("q25", "median", "q75"), map(float, values)))


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
