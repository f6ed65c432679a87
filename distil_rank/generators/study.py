"""The whole study: sweeps, the 2 x 2 ablation with its verdict, final sizes, comparison.

    distil-rank generator study --preset nano --data proteins.fasta --out results/generators
    distil-rank generator study --preset protgpt2 --data uniref50.fasta --out results/generators --device cuda

Every choice (temperature, alpha, learning rate of each cell and schedule) is made on validation proteins, every claim
on test proteins. Runs are kept in `--work`, so an interrupted study goes on, and a second one only makes what is new.
Figures and paper come with `distil-rank report --results` and the folder of --out.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distil_rank.generators.data import Encoded
from distil_rank.generators.loss import Objective
from distil_rank.generators.paper import SCHEMA
from distil_rank.generators.phases import ablate, final_sizes, sweep
from distil_rank.generators.presets import PRESETS, Preset
from distil_rank.generators.runs import Bench, Material, Run, make, uncertainty_examples
from distil_rank.core.records import config_record, environment, require_writable, sha256, shown_path, write_json

CURVES = "distil-rank/generator-study-curves/1"


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

    def outcomes(runs: list[Run]) -> list[dict[str, Any]]:
        return make(runs, material, config.work, config.workers, bench)

    temperature = sweep(preset, shape, "temperature", preset.temperatures, Objective(), outcomes)
    alpha = sweep(preset, shape, "alpha", preset.alphas, Objective(temperature=temperature["chosen"]), outcomes)
    base = Objective(temperature["chosen"], alpha["chosen"])
    ablation, runs = ablate(preset, shape, base, outcomes)
    sizes, histories = final_sizes(preset, config.retry, config.save_students, bench, base, outcomes)
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


def token_frequencies_perplexity(train: Encoded, test: Encoded) -> float:
    """Test perplexity of the training proteins' token frequencies: what a model reaches that knows no context."""
    predicted = [np.delete(part.tokens, part.offsets[:-1]) for part in (train, test)]
    size = int(max(p.max() for p in predicted)) + 1
    counts = np.bincount(predicted[0], minlength=size) + 1
    return float(np.exp(-np.log(counts / counts.sum())[predicted[1]].mean()))


def _same_split(teacher: str, test_sha256: str) -> bool | None:
    """Whether the teacher's own training left out these test proteins; None when its record is not at hand."""
    import json

    record = Path(teacher) / "training.json"
    if not record.is_file():
        return None
    return bool(json.loads(record.read_text())["data"].get("test_sha256") == test_sha256)
