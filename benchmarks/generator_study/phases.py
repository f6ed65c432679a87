"""The phases of a study: sweeps, the 2 x 2 ablation, final students."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.generator_study.interaction import contrasts, detectable, over_runs, relative
from benchmarks.generator_study.presets import (
    CELLS,
    ENHANCEMENTS,
    FIRST_PILOT,
    THRESHOLDS,
    Preset,
)
from benchmarks.generator_study.runs import Bench, Run
from distil_rank.core.records import Metric, Record
from distil_rank.generators.loss import Objective
from distil_rank.generators.train import Schedule

Shape = tuple[int, int, int]
Outcomes = Callable[[list[Run]], list[Record]]  # runs to what they came to, in order


def sweep(
    preset: Preset,
    shape: Shape,
    field: str,
    values: tuple[float, ...],
    base: Objective,
    outcomes: Outcomes,
) -> Record:
    """One field of the objective, with and without the enhancements; the baseline chooses."""
    rate = preset.rates[len(preset.rates) // 2]
    middle = Schedule(preset.steps, preset.batch_size, learning_rate=rate, seed=FIRST_PILOT)
    cells = ("baseline", "both")
    objectives = [
        replace(base, **(ENHANCEMENTS[cell] | {field: float(v)})) for cell in cells for v in values
    ]
    done = iter(outcomes([Run(shape, objective, middle) for objective in objectives]))
    found: Record = {
        cell: [
            {field: v} | {name: o[name] for name in ("ratio", "validation_nll", "signed_gap")}
            for v, o in zip(values, islice(done, len(values)))
        ]
        for cell in cells
    }
    found["chosen"] = float(
        min(found["baseline"], key=lambda entry: entry["validation_nll"])[field]
    )
    return found


def rates_by_pilots(
    preset: Preset, shape: Shape, base: Objective, outcomes: Outcomes
) -> dict[tuple[str, str], dict[float, float]]:
    """Mean validation loss over pilots of every learning rate, of each schedule and cell."""
    places = [(name, warmup, cell) for name, warmup in preset.warmups for cell in CELLS]
    plain = Schedule(preset.steps, preset.batch_size)
    pilots = [
        Run(
            shape,
            replace(base, **ENHANCEMENTS[cell]),
            replace(plain, learning_rate=rate, warmup=warmup, seed=FIRST_PILOT + i),
            pilot=True,
        )
        for _, warmup, cell in places
        for rate in preset.rates
        for i in range(preset.pilots)
    ]
    losses = np.array([o["validation_nll"] for o in outcomes(pilots)])
    means = losses.reshape(len(places), len(preset.rates), preset.pilots).mean(2).tolist()
    return {
        (name, cell): dict(zip(preset.rates, row)) for (name, _, cell), row in zip(places, means)
    }


def ablate(
    preset: Preset, shape: Shape, base: Objective, outcomes: Outcomes
) -> tuple[Record, Record]:
    """2 x 2 cells x seeds under each schedule, each at the learning rate its pilots chose."""
    tried = rates_by_pilots(preset, shape, base, outcomes)
    rates = {place: min(by_rate, key=by_rate.__getitem__) for place, by_rate in tried.items()}
    plain = Schedule(preset.steps, preset.batch_size)
    plan = {
        (name, cell): [
            Run(
                shape,
                replace(base, **ENHANCEMENTS[cell]),
                replace(plain, learning_rate=rates[name, cell], warmup=warmup, seed=seed),
            )
            for seed in range(preset.seeds)
        ]
        for name, warmup in preset.warmups
        for cell in CELLS
    }
    done = iter(outcomes([run for runs in plan.values() for run in runs]))
    results = {place: [next(done) for _ in runs] for place, runs in plan.items()}
    found: Record = {"objective": asdict(base), "schedules": {}}
    curves: Record = {}
    for name, _ in preset.warmups:
        y = {cell: [o["log_perplexity"] for o in results[name, cell]] for cell in CELLS}
        deviation = statistics.stdev(b - u - c + z for z, u, c, b in zip(*(y[c] for c in CELLS)))
        found["schedules"][name] = {
            "cells": {
                cell: {
                    "learning_rate": rates[name, cell],
                    "validation_nll_by_rate": {f"{k:g}": v for k, v in tried[name, cell].items()},
                    "log_perplexity": y[cell],
                    **{
                        metric: over_runs([o[metric]["value"] for o in results[name, cell]])
                        for metric in ("ratio", "kl_to_teacher", "calibration_error", "signed_gap")
                    },
                }
                for cell in CELLS
            },
            "contrasts": contrasts(y),
            "detectable_interaction": detectable(deviation, preset.seeds),
        }
        curves[name] = {cell: [o["curve"] for o in results[name, cell]] for cell in CELLS}
    names = [name for name, _ in preset.warmups]
    pairs = zip(results[names[0], "baseline"], results[names[-1], "baseline"])
    shift = relative([b["log_perplexity"] - a["log_perplexity"] for a, b in pairs])
    found["schedule_effect"] = {"from": names[0], "to": names[-1], **shift}
    return found, curves


def final_sizes(
    preset: Preset,
    keep: Path | None,
    bench: Bench,
    base: Objective,
    outcomes: Outcomes,
) -> tuple[Record, Record]:
    """The final students, each at the learning rate of its best pilot, each fully evaluated."""
    from distil_rank.generators.evaluate import NEAREST_OF, Bed, compare, measure
    from distil_rank.generators.models import save

    plain = Schedule(preset.steps, preset.batch_size, seed=FIRST_PILOT)
    pilots = [
        Run(shape, base, replace(plain, learning_rate=rate), pilot=True)
        for shape in preset.sizes.values()
        for rate in preset.rates
    ]
    losses = np.array([o["validation_nll"] for o in outcomes(pilots)]).reshape(
        len(preset.sizes), -1
    )
    best = [preset.rates[i] for i in losses.argmin(1)]
    sizes: Record = {}
    histories: Record = {}
    natural, training = (
        bench.prepared.sequences("test"),
        bench.prepared.sequences("train", NEAREST_OF),
    )
    bed = Bed(bench.tokenizer, bench.test, natural, training, preset.generate)
    known = measure(bench.teacher, bed)
    for (name, shape), rate in zip(preset.sizes.items(), best, strict=True):
        schedule = Schedule(preset.final_steps, preset.batch_size, learning_rate=rate, seed=0)
        student, log = bench.student(Run(shape, base, schedule))
        record: Record = {**compare(student, bench.teacher, bed, known)}
        record["verdict"] = verdict(record["ratio"], name)
        record["learning_rate"] = rate
        sizes[name] = record
        every = max(1, len(log) // 60)
        histories[name] = [[entry["step"], entry["loss"]] for entry in log[::every]]
        if keep:
            import torch

            save(student.to("cpu"), bench.tokenizer, keep / name, torch.float16)
    return sizes, histories


def verdict(ratio: Metric, size: str) -> Record:
    """Whether a perplexity ratio meets the size's threshold."""
    threshold = THRESHOLDS.get(size)
    found: Record = {"size": size, "threshold": threshold}
    if threshold is not None:
        found["met"] = ratio["value"] < threshold
        found["certain"] = ratio["high"] < threshold or ratio["low"] >= threshold
    return found
