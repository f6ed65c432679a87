"""The phases of a study: sweeps, the 2 x 2 ablation, final students. What a run is and how it is made is `runs`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distil_rank.generators.fit import Schedule
from distil_rank.generators.interaction import CELLS, contrasts, detectable, t_interval
from distil_rank.generators.loss import Objective
from distil_rank.generators.presets import ENHANCEMENTS, FIRST_PILOT, Preset
from distil_rank.generators.runs import Bench, Run

Shape = tuple[int, int, int]
Outcomes = Callable[[list[Run]], list[dict[str, Any]]]  # runs to what they came to, in order


def sweep(
    preset: Preset, shape: Shape, field: str, values: tuple[float, ...], base: Objective, outcomes: Outcomes
) -> dict[str, Any]:
    """One field of the objective, with and without the enhancements; the value is chosen by the baseline."""
    rate = preset.rates[len(preset.rates) // 2]
    middle = Schedule(preset.steps, preset.batch_size, learning_rate=rate, seed=FIRST_PILOT)
    cells = ("baseline", "both")
    objectives = [replace(base, **(ENHANCEMENTS[cell] | {field: float(v)})) for cell in cells for v in values]
    done = iter(outcomes([Run(shape, objective, middle) for objective in objectives]))
    found: dict[str, Any] = {
        cell: [
            {field: v} | {name: o[name] for name in ("ratio", "validation_nll", "signed_gap")}
            for v, o in zip(values, islice(done, len(values)), strict=True)
        ]
        for cell in cells
    }
    found["chosen"] = float(min(found["baseline"], key=lambda entry: entry["validation_nll"])[field])
    return found


def ablate(preset: Preset, shape: Shape, base: Objective, outcomes: Outcomes) -> tuple[dict[str, Any], dict[str, Any]]:
    """2 x 2 cells x seeds under each schedule; each cell's and schedule's learning rate is that of the lowest mean
    validation loss over pilots."""
    found: dict[str, Any] = {"objective": asdict(base), "schedules": {}}
    curves: dict[str, Any] = {}
    places = [(name, warmup, cell) for name, warmup in preset.warmups for cell in CELLS]
    pilots = [
        Run(
            shape,
            replace(base, **ENHANCEMENTS[cell]),
            Schedule(preset.steps, preset.batch_size, learning_rate=rate, warmup=warmup, seed=FIRST_PILOT + i),
            pilot=True,
        )
        for _, warmup, cell in places
        for rate in preset.rates
        for i in range(preset.pilots)
    ]
    losses = np.array([o["validation_nll"] for o in outcomes(pilots)])
    by_rate = losses.reshape(len(places), len(preset.rates), preset.pilots).mean(2)
    plan: dict[tuple[str, str], list[Run]] = {}
    tried: dict[tuple[str, str], dict[str, float]] = {}
    for (name, warmup, cell), nll in zip(places, by_rate.tolist(), strict=True):
        tried[name, cell] = {f"{rate:g}": loss for rate, loss in zip(preset.rates, nll, strict=True)}
        plain = Schedule(
            preset.steps, preset.batch_size, learning_rate=preset.rates[int(np.argmin(nll))], warmup=warmup
        )
        plan[name, cell] = [
            Run(shape, replace(base, **ENHANCEMENTS[cell]), replace(plain, seed=seed)) for seed in range(preset.seeds)
        ]
    done = iter(outcomes([run for runs in plan.values() for run in runs]))
    results = {place: [next(done) for _ in runs] for place, runs in plan.items()}
    for name, _ in preset.warmups:
        cells = {cell: results[name, cell] for cell in CELLS}
        y = {cell: [o["log_perplexity"] for o in cells[cell]] for cell in CELLS}
        deviation = statistics.stdev(b - u - c + z for z, u, c, b in zip(*(y[cell] for cell in CELLS), strict=True))
        found["schedules"][name] = {
            "cells": {
                cell: {
                    "learning_rate": plan[name, cell][0].schedule.learning_rate,
                    "validation_nll_by_rate": tried[name, cell],
                    "log_perplexity": y[cell],
                    "ratio": _over_runs([o["ratio"]["value"] for o in cells[cell]]),
                    "kl_to_teacher": _over_runs([o["kl_to_teacher"]["value"] for o in cells[cell]]),
                    "ece_debiased": _over_runs([o["ece_debiased"]["value"] for o in cells[cell]]),
                    "signed_gap": _over_runs([o["signed_gap"]["value"] for o in cells[cell]]),
                }
                for cell in CELLS
            },
            "contrasts": contrasts(y),
            "detectable_interaction": detectable(deviation, preset.seeds),
        }
        curves[name] = {cell: [o["curve"] for o in cells[cell]] for cell in CELLS}
    names = [name for name, _ in preset.warmups]
    pairs = zip(results[names[0], "baseline"], results[names[-1], "baseline"], strict=True)
    shift = [b["log_perplexity"] - a["log_perplexity"] for a, b in pairs]
    found["schedule_effect"] = {
        "from": names[0], "to": names[-1],
        **dict(zip(("value", "low", "high"), (float(np.expm1(v)) for v in t_interval(shift)), strict=True)),
        "higher_is_better": False,
    }  # fmt: skip
    return found, curves


def final_sizes(
    preset: Preset, retry: bool, keep: Path | None, bench: Bench, base: Objective, outcomes: Outcomes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The final students, each at the learning rate of its best pilot, each fully evaluated."""
    from distil_rank.generators.evaluate import NEXT_SHARES, Bed, compare, measure, verdict
    from distil_rank.generators.models import save

    plain = Schedule(preset.steps, preset.batch_size, seed=FIRST_PILOT)
    pilots = [
        Run(shape, base, replace(plain, learning_rate=rate), pilot=True)
        for shape in preset.sizes.values()
        for rate in preset.rates
    ]
    losses = np.array([o["validation_nll"] for o in outcomes(pilots)]).reshape(len(preset.sizes), -1)
    best = [preset.rates[i] for i in losses.argmin(1)]
    sizes: dict[str, Any] = {}
    histories: dict[str, Any] = {}
    bed = Bed(bench.tokenizer, bench.test, bench.splits.test, bench.splits.train, preset.generate)
    known = measure(bench.teacher, bed)
    for (name, shape), rate in zip(preset.sizes.items(), best, strict=True):
        shares = [preset.train_size_prop, *(s for s in NEXT_SHARES if s > preset.train_size_prop)]
        for share in shares if retry else shares[:1]:
            here = bench if share == preset.train_size_prop else Bench(replace(bench.material, train_size_prop=share))
            schedule = Schedule(preset.final_steps, preset.batch_size, learning_rate=rate, seed=0)
            student, log = here.student(Run(shape, base, schedule))
            record = compare(student, here.teacher, replace(bed, training=here.splits.train), known)
            record["verdict"] = verdict(record["ratio"], name)
            record["train_size_prop"], record["learning_rate"] = share, rate
            if record["verdict"].get("met", True):
                break
        sizes[name] = record
        every = max(1, len(log) // 60)
        histories[name] = [[entry["step"], entry["loss"]] for entry in log[::every]]
        if keep:
            import torch

            save(student.to("cpu"), bench.tokenizer, keep / name, torch.float16)
    return sizes, histories


def _over_runs(values: list[float]) -> dict[str, Any]:
    value, low, high = t_interval(values)
    return {"value": value, "low": low, "high": high, "higher_is_better": False, "runs": len(values)}
