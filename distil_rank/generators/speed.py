"""How fast a generator writes, and how much memory it takes: medians on this machine, to be read as ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def writing_speed(
    models: dict[str, Any], batch_sizes: tuple[int, ...] = (1, 8, 32), tokens: int = 64, repeats: int = 3
) -> dict[str, Any]:
    """Tokens and sequences (of `tokens` tokens) per second of greedy writing with a cache, models interleaved."""
    found: dict[str, Any] = {"tokens_per_sequence": tokens, "repeats": repeats, "models": {name: {} for name in models}}
    for size in batch_sizes:
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(repeats + 1):
            for name, model in models.items():
                taken = _write(model, size, tokens)
                if repeat:  # the first round warms up
                    seconds[name].append(taken)
        for name, times in seconds.items():
            middle = statistics.median(times)
            found["models"][name][str(size)] = {
                "tokens_per_second": size * tokens / middle,
                "sequences_per_second": size / middle,
                "spread": (max(times) - min(times)) / middle,
            }
    for name, model in models.items():
        found["models"][name]["weights_mib"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        found["models"][name]["peak_mib"] = peak_memory(model, max(batch_sizes), tokens)
    return found


def _write(model: Any, size: int, tokens: int) -> float:
    device = next(model.parameters()).device
    current, past = torch.full((size, 1), model.config.eos_token_id, device=device), None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(tokens):
        out = model(input_ids=current, past_key_values=past, use_cache=True)
        past, current = out.past_key_values, out.logits[:, -1:].argmax(-1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def peak_memory(model: Any, size: int, tokens: int) -> float:
    """MiB a forward pass over (size, tokens) holds at its peak, weights included (the allocator's own count)."""
    device = next(model.parameters()).device
    inputs = torch.full((size, tokens), model.config.eos_token_id, device=device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(input_ids=inputs, use_cache=False)
        return (torch.cuda.max_memory_allocated(device) - before + weights) / 2**20
    return (peak_bytes(lambda: model(input_ids=inputs, use_cache=False)) + weights) / 2**20


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes held at once of those that torch allocates on the processor while `function` runs."""
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
