"""Train a student for every temperature, alpha and learning rate of a grid.

    distil-rank generator sweep --teacher models/nano-teacher --data proteins.fasta --out sweeps \\
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
from pathlib import Path
from typing import Any

from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError
from distil_rank.core.records import (
    Record,
    config_record,
    environment,
    require_writable,
    sha256,
    shown_path,
    write_json,
)
from distil_rank.core.resume import Cache as Results
from distil_rank.generators.data import check_shares, encode, prepare, read_sequences
from distil_rank.generators.inherit import initial_student
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import check_shape, load, weights_sha256
from distil_rank.generators.teachers import Cache
from distil_rank.generators.train import Schedule, fit, mean_nll

SCHEMA = "distil-rank/generator-sweep/2"


@dataclass(frozen=True)
class Config:
    teacher: str  # a generator by folder or name on the Hugging Face hub
    data: Path  # proteins: FASTA (plain or gzip), or CSV, TSV or parquet with a column `sequence`
    out: Path  # where to write
    taus: tuple[float, ...] = (1, 2, 4, 6, 8, 10)  # values of tau to try
    alphas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # values of alpha to try
    learning_rates: tuple[float, ...] = (1e-3,)  # values to try
    enhancements: tuple[bool, ...] = (False,)  # False: neither, True: uncertainty and calibration
    n_layer: int = 4  # layers of the network
    n_head: int = 4  # attention heads
    n_embd: int = 256  # width of the network
    steps: int = 1000  # steps of the optimizer
    batch_size: int = 32  # proteins per step
    train_size_prop: float = 1.0  # share of the training proteins that is used
    held_out: float = 0.1  # share of the proteins kept aside
    max_length: int = 1022  # longest protein in residues
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    wanted = _grid(config)
    for objective, schedule in wanted:
        objective.check()
        schedule.check()
    check_shape(config.n_layer, config.n_head, config.n_embd)
    check_shares(config.train_size_prop, config.held_out)
    device = pick_device(config.device)
    results = Results(require_writable(config.out) / "trials")
    teacher, tokenizer = load(config.teacher)
    names = ("n_layer", "n_head", "n_embd", "train_size_prop", "held_out", "max_length", "seed")
    shared = [sha256(config.data), weights_sha256(teacher), [getattr(config, n) for n in names]]
    bench = cache(lambda: _Bench(config, teacher.to(device), tokenizer))

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
        "data": {"source": shown_path(config.data), "sha256": shared[0]},
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

    def __init__(self, config: Config, teacher: Any, tokenizer: Any):
        how = (config.train_size_prop, config.held_out, config.seed, config.max_length)
        splits = prepare(read_sequences(config.data), *how)
        context = teacher.config.n_positions
        self.config, self.teacher = config, teacher
        self.train = encode(splits.train, tokenizer, context)
        self.validation = encode(splits.validation, tokenizer, context)
        self.source, self.teacher_nll = (
            Cache(teacher, self.train),
            mean_nll(teacher, self.validation),
        )

    def trial(self, objective: Objective, schedule: Schedule) -> Record:
        shape = (self.config.n_layer, self.config.n_head, self.config.n_embd)
        student = initial_student(self.teacher, *shape, "random", self.config.seed)
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
