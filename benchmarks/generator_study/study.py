"""The whole study: sweeps, the 2 x 2 ablation with its verdict, final sizes, comparison.

    python -m benchmarks.generator_study --data shards --preset nano
    python -m benchmarks.generator_study --data shards --preset protgpt2 --device cuda
    python -m benchmarks.generator_study.report results/generators   # figures, and paper.md

Every choice (temperature, alpha, learning rate of each cell and schedule) is made on validation
proteins, every claim on test proteins. Runs are kept in `--work`, so an interrupted study goes on,
and a second one only makes what is new.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.generator_study.paper import SCHEMA
from benchmarks.generator_study.phases import ablate, final_sizes, sweep
from benchmarks.generator_study.presets import PRESETS, Preset
from benchmarks.generator_study.runs import Bench, Material, Run, make, uncertainty_examples
from distil_rank.core.devices import pick_device
from distil_rank.core.records import (
    Record,
    config_record,
    environment,
    require_writable,
    shown_path,
    write_json,
)
from distil_rank.generators.data import Encoded
from distil_rank.generators.loss import Objective
from distil_rank.generators.prepared import Prepared

CURVES = "distil-rank/generator-study-curves/1"


@dataclass(frozen=True)
class Config:
    data: Path  # folder that `generator prepare` made
    out: Path = Path("results/generators")  # where to write
    preset: Literal["nano", "micro", "protgpt2"] = "nano"
    teacher: str = ""  # instead of the preset's
    work: Path = Path("generator-runs")  # folder of the single runs, kept for resumption
    workers: int = 1  # processes
    seeds: int = 0  # runs per cell of the ablation; 0: the preset's
    cache: bool = True  # ask the teacher once
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one
    save_students: Path | None = None  # keep the final students here, one folder each


def run(config: Config) -> None:
    config = replace(config, device=str(pick_device(config.device)))
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
    curves = {"schema": CURVES, **passport, **curves, "machine_dependent": []}
    write_json(config.out / "curves.json", curves)
    for name, part in study["ablation"]["schedules"].items():
        print(f"{name}: {part['contrasts']['words']}")
    print(f"{config.out}/study.json, {config.out}/curves.json")


def conduct(preset: Preset, config: Config) -> tuple[Record, Record]:
    """All phases; JSON values of the study and of its curves."""
    material = Material(preset.teacher, str(config.data), config.cache, config.device)
    bench = Bench(material)
    size, shape = next(iter(preset.sizes.items()))

    def outcomes(runs: list[Run]) -> list[Record]:
        return make(runs, material, config.work, config.workers, bench)

    temperature = sweep(preset, shape, "temperature", preset.temperatures, Objective(), outcomes)
    warm = Objective(temperature=temperature["chosen"])
    alpha = sweep(preset, shape, "alpha", preset.alphas, warm, outcomes)
    base = replace(warm, alpha=alpha["chosen"])
    ablation, runs = ablate(preset, shape, base, outcomes)
    keep = config.save_students
    sizes, histories = final_sizes(preset, keep, bench, base, outcomes)
    study = {
        "data": {
            **bench.prepared.summary(),
            "token_frequencies_perplexity": token_frequencies_perplexity(bench.train, bench.test),
            "teacher_left_these_out": _same_split(preset.teacher, bench.prepared),
        },
        "ablated_size": size,
        "teacher": next(iter(sizes.values()))["teacher"] | {"name": shown_path(preset.teacher)},
        "temperature": temperature,
        "alpha": alpha,
        "ablation": ablation,
        "sizes": sizes,
    }
    return study, {"ablation": runs, "sizes": histories, "uncertainty": uncertainty_examples(bench)}


def token_frequencies_perplexity(train: Encoded, test: Encoded) -> float:
    """Test perplexity of the training proteins' token frequencies: of a model without context."""
    predicted = [np.delete(part.tokens, part.offsets[:-1]) for part in (train, test)]
    size = int(max(p.max() for p in predicted)) + 1
    counts = np.bincount(predicted[0], minlength=size) + 1
    return float(np.exp(-np.log(counts / counts.sum())[predicted[1]].mean()))


def _same_split(teacher: str, prepared: Prepared) -> bool | None:
    """Whether the teacher's own training left out these test proteins; None when not on record."""
    record = Path(teacher) / "training.json"
    if not record.is_file():
        return None
    return bool(
        json.loads(record.read_text())["data"].get("test_sha256") == prepared.record["test_sha256"]
    )
