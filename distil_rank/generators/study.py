"""The whole study: sweeps, the 2 x 2 ablation with its verdict, final sizes, comparison.

    distil-rank generator study --preset nano --data proteins.fasta --out results/generators
    distil-rank generator study --preset protgpt2 --data uniref50.fasta --out results/generators --device cuda

Every choice (temperature, alpha, learning rate of each cell and schedule) is made on validation proteins, every claim
on test proteins. Runs are kept in `--work`, so an interrupted study goes on, and a second one only makes what is new.
Figures and paper come with `distil-rank report --results` and the folder of --out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distil_rank.generators.data import Encoded
from distil_rank.generators.fit import Schedule
from distil_rank.generators.interaction import CELLS, contrasts, detectable, t_interval
from distil_rank.generators.loss import Objective
from distil_rank.generators.paper import SCHEMA
from distil_rank.generators.runs import Bench, Material, Run, make, uncertainty_examples
from distil_rank.records import config_record, environment, require_writable, sha256, shown_path, write_json

CURVES = "distil-rank/generator-study-curves/1"
ENHANCEMENTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "uncertainty": {"uncertainty": True},
    "calibration": {"calibration": True},
    "both": {"uncertainty": True, "calibration": True},
}


@dataclass(frozen=True)
class Preset:
    """What is run at which scale."""

    teacher: str
    sizes: dict[str, tuple[int, int, int]]  # name: layers, heads, width; the first is the one swept and ablated
    steps: int
    final_steps: int
    batch_size: int
    train_size_prop: float
    held_out: float
    max_residues: int
    rates: tuple[float, ...]  # learning rates tried in every cell under every schedule; the sweeps take the middle one
    temperatures: tuple[float, ...] = (1, 2, 4, 6, 8, 10)
    alphas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    warmups: tuple[tuple[str, float], ...] = (("short warm-up", 0.05), ("long warm-up", 0.4))
    seeds: int = 5  # 0, 1, ... of the runs that are reported
    pilots: int = 3  # runs behind the choice of a learning rate, of other seeds
    generate: int = 200


FIRST_PILOT = 1000  # seeds of pilots count from here
STUDENTS = {"micro": (4, 4, 256), "tiny": (4, 4, 512), "small": (6, 8, 768), "medium": (12, 16, 1024)}
PRESETS = {
    "nano": Preset(
        "models/nano-teacher", {"tiny": (1, 2, 32), "small": (2, 2, 64), "medium": (3, 4, 96)},
        steps=300, final_steps=800, batch_size=16, train_size_prop=0.25, held_out=0.05, max_residues=250,
        rates=(1e-3, 3e-3, 1e-2, 3e-2), temperatures=(1, 2, 4, 8), alphas=(0.1, 0.5, 0.9), generate=100,
    ),
    "micro": Preset(
        "nferruz/ProtGPT2", {"micro": STUDENTS["micro"]},
        steps=2000, final_steps=5000, batch_size=32, train_size_prop=0.05, held_out=0.01, max_residues=600,
        rates=(3e-4, 1e-3, 3e-3),
    ),
    "protgpt2": Preset(
        "nferruz/ProtGPT2", STUDENTS,
        steps=5000, final_steps=50000, batch_size=64, train_size_prop=0.1, held_out=0.01, max_residues=1000,
        rates=(1e-4, 3e-4, 1e-3),
    ),
}  # fmt: skip
NEXT_SHARES = (0.2, 0.5)


@dataclass(frozen=True)
class Config:
    data: Path  # proteins: FASTA, CSV, TSV or parquet
    out: Path = Path("results/generators")  # folder of study.json and curves.json
    preset: Literal["nano", "micro", "protgpt2"] = "nano"
    teacher: str = ""  # instead of the preset's
    work: Path = Path("generator-runs")  # folder of the single runs, kept for resumption
    workers: int = 1  # processes
    seeds: int = 0  # runs per cell of the ablation; 0: the preset's
    retry: bool = False  # when a size misses its threshold, train it again on the next larger share
    cache: bool = True  # ask the teacher once
    device: str = "cpu"
    save_students: Path | None = None  # keep the final students here, one folder each


def run(config: Config) -> None:
    preset = PRESETS[config.preset]
    if config.teacher:
        preset = replace(preset, teacher=config.teacher)
    if config.seeds:
        preset = replace(preset, seeds=config.seeds)
    require_writable(config.out)
    require_writable(config.work)
    found, start = len(list(config.work.glob("*.json"))), time.perf_counter()
    study, curves = conduct(preset, config)
    study["duration"] = {
        "minutes": (time.perf_counter() - start) / 60,
        "workers": config.workers,
        "runs_found": found,  # made by an earlier study, so not in the time
    }
    passport = {
        "config": config_record(config) | {"preset_values": config_record(asdict(preset))},
        "seeds": list(range(preset.seeds)),
        "environment": environment(config.device),
    }
    write_json(
        config.out / "study.json",
        {"schema": SCHEMA, **passport, **study, "machine_dependent": ["sizes.*.speed", "duration"]},
    )
    write_json(config.out / "curves.json", {"schema": CURVES, **passport, **curves, "machine_dependent": []})
    for name, part in study["ablation"]["schedules"].items():
        print(f"{name}: {part['contrasts']['words']}")
    print(f"{config.out}/study.json, {config.out}/curves.json")


def conduct(preset: Preset, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """All phases; JSON values of the study and of its curves."""
    material = Material(
        preset.teacher, str(config.data), preset.train_size_prop, preset.held_out, preset.max_residues,
        cache=config.cache, device=config.device,
    )  # fmt: skip
    bench = Bench(material)
    size, shape = next(iter(preset.sizes.items()))
    middle = Schedule(
        steps=preset.steps,
        batch_size=preset.batch_size,
        learning_rate=preset.rates[len(preset.rates) // 2],
        seed=FIRST_PILOT,
    )

    def outcomes(runs: list[Run]) -> list[dict[str, Any]]:
        return make(runs, material, config.work, config.workers, bench)

    def sweep(field: str, values: tuple[float, ...], base: Objective) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for cell in ("baseline", "both"):
            objectives = [replace(base, **ENHANCEMENTS[cell], **_one(field, v)) for v in values]
            done = outcomes([Run(shape, objective, middle) for objective in objectives])
            found[cell] = [
                {field: v, "ratio": o["ratio"], "validation_nll": o["validation_nll"], "signed_gap": o["signed_gap"]}
                for v, o in zip(values, done, strict=True)
            ]
        found["chosen"] = min(found["baseline"], key=lambda entry: entry["validation_nll"])[field]
        return found

    temperature = sweep("temperature", preset.temperatures, Objective())
    alpha = sweep("alpha", preset.alphas, Objective(temperature=temperature["chosen"]))
    base = Objective(temperature["chosen"], alpha["chosen"])
    ablation, runs = _ablation(preset, shape, base, outcomes)
    sizes, histories = _sizes(preset, config, bench, base, ablation)
    counts = {
        "source": shown_path(config.data), "sha256": sha256(config.data), **bench.splits.counts,
        "n_train": len(bench.train), "n_validation": len(bench.validation), "n_test": len(bench.test),
        "token_frequencies_perplexity": token_frequencies_perplexity(bench.train, bench.test),
        "teacher_left_these_out": _same_split(preset.teacher, bench.splits.test_sha256),
    }  # fmt: skip
    teacher = next(iter(sizes.values()))["teacher"] | {"name": shown_path(preset.teacher)}
    study = {
        "data": counts, "ablated_size": size, "teacher": teacher, "temperature": temperature, "alpha": alpha,
        "ablation": ablation, "sizes": sizes,
    }  # fmt: skip
    return study, {"ablation": runs, "sizes": histories, "uncertainty": uncertainty_examples(bench)}


def _ablation(
    preset: Preset, shape: tuple[int, int, int], base: Objective, outcomes: Callable[[list[Run]], list[dict[str, Any]]]
) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _sizes(
    preset: Preset, config: Config, bench: Bench, base: Objective, ablation: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The final students, at the learning rate chosen for the baseline, each fully evaluated."""
    from distil_rank.generators.evaluate import Bed, compare, measure, verdict
    from distil_rank.generators.models import save

    first = next(iter(ablation["schedules"].values()))["cells"]
    sizes: dict[str, Any] = {}
    histories: dict[str, Any] = {}
    bed = Bed(bench.tokenizer, bench.test, bench.splits.test, bench.splits.train, preset.generate)
    known = measure(bench.teacher, bed)
    for name, shape in preset.sizes.items():
        shares = [preset.train_size_prop, *(s for s in NEXT_SHARES if s > preset.train_size_prop)]
        for share in shares if config.retry else shares[:1]:
            here = bench if share == preset.train_size_prop else Bench(replace(bench.material, train_size_prop=share))
            schedule = Schedule(
                preset.final_steps, preset.batch_size, learning_rate=first["baseline"]["learning_rate"], seed=0
            )
            student, log = here.student(Run(shape, base, schedule))
            record = compare(student, here.teacher, replace(bed, training=here.splits.train), known)
            record["verdict"] = verdict(record["ratio"], name)
            record["train_size_prop"] = share
            if record["verdict"].get("met", True):
                break
        sizes[name] = record
        every = max(1, len(log) // 60)
        histories[name] = [[entry["step"], entry["loss"]] for entry in log[::every]]
        if config.save_students:
            import torch

            save(student.to("cpu"), bench.tokenizer, config.save_students / name, torch.float16)
    return sizes, histories


def _one(field: str, value: float) -> dict[str, Any]:
    return {field: float(value)}


def token_frequencies_perplexity(train: Encoded, test: Encoded) -> float:
    """Test perplexity of the training proteins' token frequencies: what a model reaches that knows no context."""
    predicted = [np.delete(part.tokens, part.offsets[:-1]) for part in (train, test)]
    size = int(max(p.max() for p in predicted)) + 1
    counts = np.bincount(predicted[0], minlength=size) + 1
    return float(np.exp(-np.log(counts / counts.sum())[predicted[1]].mean()))


def _over_runs(values: list[float]) -> dict[str, Any]:
    value, low, high = t_interval(values)
    return {"value": value, "low": low, "high": high, "higher_is_better": False, "runs": len(values)}


def _same_split(teacher: str, test_sha256: str) -> bool | None:
    """Whether the teacher's own training left out these test proteins; None when its record is not at hand."""
    import json

    record = Path(teacher) / "training.json"
    if not record.is_file():
        return None
    return bool(json.loads(record.read_text())["data"].get("test_sha256") == test_sha256)
