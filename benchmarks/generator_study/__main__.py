"""What a teacher, two enhancements and a warm start are worth to a student, with controls.

    distil-rank generator prepare family.fasta.gz --out shards \\
        --split-by models/family-teacher/split.json --train-size-prop 0.11
    python -m benchmarks.generator_study --data shards --workers 2    # also draws, writes paper.md
    python -m benchmarks.generator_study --data shards --preset protgpt2 --no-cache --device cuda

Choices (learning rate, temperature, alpha) are made on validation proteins, claims on test
proteins. Runs are kept in `--work`: an interrupted study goes on, a second one makes what is new.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from benchmarks.generator_study.contrasts import claims, over_runs, planned
from benchmarks.generator_study.design import PILOT, PRESETS, THRESHOLDS, Preset, cells
from benchmarks.generator_study.figures import draw
from benchmarks.generator_study.paper import SCHEMA, paper
from benchmarks.generator_study.runs import Bench, Run, by_stratum, make, spread
from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError, at_least, one_line_errors
from distil_rank.core.records import (
    Record,
    config_record,
    environment,
    require_writable,
    shown_path,
    write_json,
    write_text,
)
from distil_rank.core.resume import Cache as Results
from distil_rank.generators.data import parse
from distil_rank.generators.evaluate import Bed, compare, measure
from distil_rank.generators.loss import Objective, entropy, position_weights, predictions
from distil_rank.generators.train import Schedule

Outcomes = Callable[[Sequence[Run]], list[Record]]  # what runs came to, in order
NEAREST_OF = 1000  # training proteins that novelty is measured against


@dataclass(frozen=True)
class Config:
    data: Path = Path("shards")  # folder that `generator prepare` made
    teacher: str = "models/family-teacher"  # a generator by folder or name on the Hugging Face hub
    out: Path = Path("results/generators")  # where to write
    preset: Literal["family", "protgpt2"] = "family"
    work: Path = Path("generator-runs")  # folder of the single runs, kept for resumption
    workers: int = 1  # processes
    seeds: int | None = None  # runs a cell; None: the preset's
    steps: int | None = None  # of each run; None: the preset's
    cache: bool = True  # ask the teacher once
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    given: Record = {"seeds": config.seeds, "steps": config.steps}
    preset = replace(PRESETS[config.preset], **{k: v for k, v in given.items() if v is not None})
    at_least(2, seeds=preset.seeds)
    at_least(1, steps=preset.steps, workers=config.workers)
    device = pick_device(config.device)
    if config.workers > 1 and device.type != "cpu":
        raise InputError(f"--workers 1 required on a GPU, got {config.workers}; or --device cpu")
    for folder in (config.out, config.work):
        require_writable(folder)
    torch.set_num_threads(1)  # sums in one order, whatever the number of processes
    found, start = len(list(config.work.glob("*.json"))), time.perf_counter()
    most = preset.test_proteins
    bench = Bench(config.teacher, config.data, most, str(device), config.cache)
    study = conduct(preset, config, bench)
    minutes = (time.perf_counter() - start) / 60
    record = {
        "schema": SCHEMA,
        "config": config_record(config) | {"preset_values": config_record(asdict(preset))},
        "seeds": list(range(preset.seeds)),
        **study,
        "duration": {"minutes": minutes, "workers": config.workers, "runs_found": found},
        "environment": environment(device),
        "machine_dependent": ["finals.*.speed", "duration"],
    }
    write_json(config.out / "study.json", record)
    draw(config.out)
    write_text(config.out / "paper.md", paper(record, ".") + "\n")
    print(f"{config.out}/study.json: {minutes:.1f} minutes, {found} files found")


def conduct(preset: Preset, config: Config, bench: Bench) -> Record:
    """All phases, as JSON values."""
    outcomes = partial(make, bench=bench, work=config.work, workers=config.workers)
    rates, tried = pilots(preset, outcomes)
    plain = schedule(preset)
    first = next(iter(preset.sizes))

    def runs(size: str, objective: Objective, init: str) -> list[Run]:
        own = replace(plain, learning_rate=rates[size, objective.alpha < 1, init])
        shape = preset.sizes[size]
        return [Run(shape, objective, replace(own, seed=s), init) for s in range(preset.seeds)]

    doses: Record = {}
    base = Objective()
    for field, values in (("temperature", preset.temperatures), ("alpha", preset.alphas)):
        objectives = [replace(base, **{field: float(v)}) for v in values]  # type: ignore[arg-type]
        done = iter(outcomes([r for o in objectives for r in runs(first, o, "random")]))
        doses[field] = {
            f"{value:g}": summary([next(done) for _ in range(preset.seeds)]) for value in values
        }
        best = min(doses[field], key=lambda value: doses[field][value]["validation_nll"])
        base = replace(base, **{field: float(best)})  # type: ignore[arg-type]
    plan = {
        (size, name): runs(size, *cell)
        for size in preset.sizes
        for name, cell in cells(base).items()
    }
    done = iter(outcomes([r for own in plan.values() for r in own]))
    table = {
        size: {name: summary([next(done) for _ in plan[size, name]]) for name in cells(base)}
        for size in preset.sizes
    }
    y = {s: {name: cell["log_perplexity"] for name, cell in of.items()} for s, of in table.items()}
    effects = planned(y)
    return {
        "data": bench.prepared.summary() | {"test_proteins_used": len(bench.test)},
        "teacher_left_these_out": not bench.prepared.doubts(config.teacher),
        "strata": {name: int(mask.sum()) for name, mask in bench.strata.items()},
        "references": references(bench, shown_path(config.teacher)),
        "objective": asdict(base),
        "rates": tried,
        "dose_of_enhancements": dose_of_enhancements(bench, base),
        "doses": doses,
        "cells": table,
        "effects": effects,
        "claims": {size: claims(of) for size, of in effects.items()},
        "finals": finals(preset, config, bench, plan, table),
    }


def pilots(preset: Preset, outcomes: Outcomes) -> tuple[dict[tuple[str, bool, str], float], Record]:
    """Best learning rate of each size, with and without teacher, random or slice."""
    places = [(s, taught, i) for s in preset.sizes for taught in (True, False) for i in INITS]
    plain = replace(schedule(preset), seed=PILOT)
    plan = [
        Run(
            preset.sizes[size],
            Objective() if taught else Objective(alpha=1.0),
            replace(plain, learning_rate=rate),
            init,
            pilot=True,
        )
        for size, taught, init in places
        for rate in preset.rates
    ]
    losses = np.array([o["validation_nll"] for o in outcomes(plan)]).reshape(len(places), -1)
    best = {place: preset.rates[i] for place, i in zip(places, losses.argmin(1))}
    tried = {
        f"{size}, {'teacher' if taught else 'no teacher'}, {init}": {
            "chosen": best[size, taught, init],
            "validation_nll": row.tolist(),
        }
        for (size, taught, init), row in zip(places, losses)
    }
    return best, tried


def schedule(preset: Preset) -> Schedule:
    return Schedule(preset.steps, preset.batch_size, warmup=0.1, optimizer=preset.optimizer)


INITS = ("random", "slice")


def summary(outcomes: Sequence[Record]) -> Record:
    """A cell: its runs' log perplexities by stratum, and means with intervals over runs."""
    by_stratum = [o["log_perplexity"] for o in outcomes]
    y = {name: [found[name] for found in by_stratum] for name in by_stratum[0]}
    perplexity = {}
    for name, values in y.items():
        mean = over_runs(values)
        bounds = {k: float(np.exp(mean[k])) for k in ("value", "low", "high")}  # type: ignore[literal-required]
        perplexity[name] = mean | bounds
    return {
        "log_perplexity": y,
        "perplexity": perplexity,
        "validation_nll": float(np.mean([o["validation_nll"] for o in outcomes])),
        "parameters": outcomes[0]["parameters"],
        "calibration_error": over_runs([o["calibration_error"] for o in outcomes]),
    }


def references(bench: Bench, name: str) -> Record:
    """Perplexity by stratum of the teacher, and of token frequencies: a model without context."""
    from distil_rank.generators.models import parameters

    train, test = bench.train, bench.measured
    counts = np.bincount(
        np.delete(train.tokens, train.offsets[:-1]), minlength=len(bench.tokenizer)
    )
    surprise = -np.log((counts + 1) / (counts + 1).sum())
    alone = np.array([surprise[test.row(i)[1:]].sum() for i in range(len(test))])
    scores = {"teacher": bench.scores.nll, "token frequencies": alone}
    found = {
        k: by_stratum(nll, bench.scores.predictions, bench.strata) for k, nll in scores.items()
    }
    perplexity = {k: {s: float(np.exp(v)) for s, v in of.items()} for k, of in found.items()}
    return {"perplexity": perplexity, "name": name, "parameters": parameters(bench.teacher)}


def dose_of_enhancements(bench: Bench, base: Objective) -> Record:
    """Quartiles over residues of the uncertainty weight and of the mass calibration moves."""
    tokens, mask = bench.test.batch(range(min(64, len(bench.test))))
    with torch.no_grad():
        logits = bench.teacher(input_ids=tokens.to(bench.device), use_cache=False).logits.cpu()
    counted = predictions(mask)
    residues = counted & ~torch.isin(tokens[:, 1:], torch.tensor(bench.test.layout))
    entropies = entropy(logits.flatten(0, 1)).view(tokens.shape)[:, :-1]
    weights = position_weights(entropies, counted, residues)[residues]
    top = torch.softmax(logits[:, :-1] / base.temperature, -1).amax(-1)[residues]
    moved, at = base.smoothing * (1 - top), torch.tensor([0.25, 0.5, 0.75])
    return {"weight": weights.quantile(at).tolist(), "smoothing": moved.quantile(at).tolist()}


def finals(
    preset: Preset,
    config: Config,
    bench: Bench,
    plan: dict[tuple[str, str], list[Run]],
    table: dict[str, Record],
) -> Record:
    """A student of each size, of the cell best on validation, trained longer: all metrics."""
    training = bench.prepared.sequences("train", NEAREST_OF)
    texts = bench.tokenizer.batch_decode([bench.test.row(i) for i in range(len(bench.test))])
    natural = [parse(text)[0] for text in texts]
    given = (bench.tokenizer, bench.test, natural, training, preset.generate)
    bed, results = Bed(*given, family=training), Results(config.work)
    known = cache(lambda: measure(bench.teacher, bed))  # once, and not where all was made before
    best = {
        size: min(of, key=lambda name: of[name]["validation_nll"]) for size, of in table.items()
    }

    def final(size: str) -> Record:
        run = plan[size, best[size]][0]
        steps = preset.final_times * run.schedule.steps
        run = replace(run, schedule=replace(run.schedule, steps=steps))
        asked = [bench.request(run), preset.generate, NEAREST_OF]
        measured = lambda: compare(bench.student(run), bench.teacher, bed, known())  # noqa: E731
        made = results.json("final", asked, measured)
        return {"cell": best[size], "threshold": THRESHOLDS.get(size), **made}

    return dict(zip(table, spread(final, [*table][::-1], config.workers)[::-1]))


if __name__ == "__main__":
    with one_line_errors("benchmarks.generator_study"):
        run(tyro.cli(Config, description=__doc__))
