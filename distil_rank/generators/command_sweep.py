"""Train a student for every temperature, alpha and learning rate of a grid.

    distil-rank generator sweep --teacher models/nano-teacher --data shards --out sweeps \\
        --taus 1 2 4 6 8 10 --alphas .1 .3 .5 .7 .9 --learning-rates 1e-3 --steps 500

Every trial is kept, so the same command goes on where it was stopped, a wider grid only makes what
is new, and several terminals share the work. `sweep.json` ranks the trials by their loss on
validation proteins: a sweep is a choice, so it does not look at the test proteins.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError
from distil_rank.core.records import (
    Record,
    config_record,
    environment,
    require_writable,
    write_json,
)
from distil_rank.core.resume import Cache as Results
from distil_rank.generators.command_train import CommonFlags, ShapeFlags
from distil_rank.generators.data import Encoded
from distil_rank.generators.inherit import initial_student
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import load, require_same_vocabulary, weights_sha256
from distil_rank.generators.prepared import Prepared
from distil_rank.generators.teachers import Cache
from distil_rank.generators.train import Schedule, fit, mean_nll

SCHEMA = "distil-rank/generator-sweep/2"


@dataclass(frozen=True, kw_only=True)
class Config(ShapeFlags, CommonFlags):
    teacher: str  # a generator by folder or name on the Hugging Face hub
    taus: tuple[float, ...] = (1, 2, 4, 6, 8, 10)  # values of tau to try
    alphas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # values of alpha to try
    learning_rates: tuple[float, ...] = (1e-3,)  # values to try
    enhancements: tuple[bool, ...] = (False,)  # False: neither, True: uncertainty and calibration


def run(config: Config) -> None:
    wanted = _grid(config)
    for objective, schedule in wanted:
        objective.check()
        schedule.check()
    shape = config.shape
    device = pick_device(config.device)
    results = Results(require_writable(config.out) / "trials")
    prepared = Prepared(config.data)
    teacher, tokenizer = load(config.teacher)
    require_same_vocabulary(tokenizer, prepared.tokenizer)
    train, validation = prepared.training_parts(teacher)
    shared = [train.sha256, validation.sha256, weights_sha256(teacher), shape, config.seed]
    bench = cache(lambda: _Bench(config, teacher.to(device), train, validation))

    def trial(objective: Objective, schedule: Schedule) -> Record:
        return bench().trial(objective, schedule)

    order, made = list(enumerate(wanted)), 0
    random.Random(os.getpid()).shuffle(order)  # two terminals seldom make the same trial
    found: dict[int, Record] = {}
    for number, (objective, schedule) in order:
        request = [asdict(objective), asdict(schedule), shared]
        made += not results.path("trial", request).exists()
        found[number] = results.json("trial", request, partial(trial, objective, schedule))
    trials = [found[number] for number in range(len(wanted))]
    trials.sort(key=lambda trial: trial["validation_nll"])
    record = {
        "schema": SCHEMA,
        "config": config_record(config),
        "data": prepared.summary(),
        "seeds": [config.seed],
        "trials": trials,
        "environment": environment(device),
        "machine_dependent": [],
    }
    write_json(config.out / "sweep.json", record)
    best = ", ".join(f"{name} {trials[0][name]}" for name in ("tau", "alpha", "learning_rate"))
    print(
        f"{config.out}/sweep.json: {len(trials)} trials, {made or 'none'} new; "
        f"best {best} at {trials[0]['validation_nll']:.4f} nats per token"
    )


def _grid(config: Config) -> list[tuple[Objective, Schedule]]:
    grid = (config.taus, config.alphas, config.enhancements, config.learning_rates)
    found = [
        (
            Objective(tau, alpha, uncertainty=enhanced, calibration=enhanced),
            Schedule(config.steps, config.batch_size, learning_rate=rate, seed=config.seed),
        )
        for tau, alpha, enhanced, rate in itertools.product(*grid)
    ]
    if not found:
        raise InputError("at least one value of each --taus, --alphas, --learning-rates required")
    return found


class _Bench:
    """What all trials share: proteins and the teacher's targets."""

    def __init__(self, config: Config, teacher: Any, train: Encoded, validation: Encoded):
        self.config, self.teacher = config, teacher
        self.train, self.validation = train, validation
        self.source = Cache(teacher, train)
        self.teacher_nll = mean_nll(teacher, validation)

    def trial(self, objective: Objective, schedule: Schedule) -> Record:
        student = initial_student(self.teacher, *self.config.shape, "random", self.config.seed)
        student.to(self.teacher.device)
        fit(student, self.train, None, self.source, objective, schedule)
        nll = mean_nll(student, self.validation)
        return {
            "tau": objective.temperature,
            "alpha": objective.alpha,
            "learning_rate": schedule.learning_rate,
            "enhancements": objective.uncertainty,
            "validation_nll": nll,
            "validation_ratio": math.exp(nll - self.teacher_nll),  # perplexity over the teacher's
            "n_train": len(self.train),
        }
