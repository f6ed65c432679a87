"""Sweep temperature, alpha and learning rate on a grid; stopped and parallel sweeps share one SQLite file.

    distil-rank generator sweep --teacher models/nano-teacher --data proteins.fasta --out sweeps/micro \\
        --temperature 1 2 4 6 8 10 --alpha .1 .3 .5 .7 .9 --learning-rate 1e-3 --n-layer 4 --n-head 4 --n-embd 256
        --steps 500

Give the same command again to go on, or in several terminals to share the work. `sweep.json` ranks what is finished
by the perplexity on validation proteins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distil_rank.core.errors import InputError
from distil_rank.generators.fit import Schedule
from distil_rank.generators.loss import Objective
from distil_rank.core.records import config_record, environment, require_writable, sha256, shown_path, write_json

SCHEMA = "distil-rank/generator-sweep/1"


@dataclass(frozen=True)
class Config:
    teacher: str  # folder or hub name
    data: Path  # proteins: FASTA, CSV, TSV or parquet
    out: Path  # folder of sweep.db and sweep.json
    temperature: tuple[float, ...] = (1, 2, 4, 6, 8, 10)  # values to try
    alpha: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # values to try
    learning_rate: tuple[float, ...] = (1e-3,)  # values to try
    enhancements: tuple[bool, ...] = field(default=(False,))  # try without (False), with both enhancements (True)
    n_layer: int = 4  # layers of the student
    n_head: int = 4  # attention heads
    n_embd: int = 256  # width
    steps: int = 500  # steps of every trial
    batch_size: int = 32  # proteins per step
    train_size_prop: float = 0.1  # share of the training proteins
    held_out: float = 0.05  # share of validation, and of test
    max_residues: int = 1000  # leave longer proteins out
    trials: int = 0  # trials of this call; 0: until the grid is finished
    seed: int = 0
    device: str = "auto"


def run(config: Config) -> None:
    import optuna

    from distil_rank.generators.models import check_shape
    from distil_rank.generators.runs import Bench, Material, Run
    from distil_rank.generators.training import choose_device

    grid: dict[str, Any] = {
        "temperature": list(config.temperature),
        "alpha": list(config.alpha),
        "learning_rate": list(config.learning_rate),
        "enhancements": list(config.enhancements),
    }
    for name, values in grid.items():
        if not values:
            raise InputError(f"at least one {name.replace('_', '-')} required, got none")
    for temperature in config.temperature:
        for alpha in config.alpha:
            Objective(temperature, alpha).check()
    for rate in config.learning_rate:
        Schedule(config.steps, config.batch_size, learning_rate=rate).check()
    shape = (config.n_layer, config.n_head, config.n_embd)
    check_shape(*shape)
    device = str(choose_device(config.device))
    bench = Bench(
        Material(
            config.teacher,
            str(config.data),
            config.train_size_prop,
            config.held_out,
            config.max_residues,
            config.seed,
            True,
            device,
        )
    )
    folder = require_writable(config.out)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = {k: v for k, v in config_record(config).items() if k not in ("out", "trials", "device", *grid)}
    study = optuna.create_study(
        study_name="sweep",
        storage=f"sqlite:///{folder / 'sweep.db'}",
        load_if_exists=True,
        direction="minimize",
        sampler=optuna.samplers.GridSampler(grid, seed=config.seed),
    )
    if study.user_attrs.get("settings", settings) != settings:
        raise InputError(
            f"the settings that {folder}/sweep.db was begun with required to go on, got others; choose another --out"
        )
    study.set_user_attr("settings", settings)

    def objective(trial: Any) -> float:
        chosen = {name: trial.suggest_categorical(name, values) for name, values in grid.items()}
        both = chosen["enhancements"]
        wanted = Objective(chosen["temperature"], chosen["alpha"], uncertainty=both, calibration=both)
        schedule = Schedule(config.steps, config.batch_size, learning_rate=chosen["learning_rate"], seed=config.seed)
        found = bench.outcome(Run(shape, wanted, schedule))
        trial.set_user_attr("ratio", found["ratio"])
        trial.set_user_attr("signed_gap", found["signed_gap"])
        return float(found["validation_nll"])

    study.optimize(objective, n_trials=config.trials or None)
    finished = sorted((t for t in study.trials if t.state.name == "COMPLETE"), key=lambda t: t.value or 0.0)
    write_json(
        folder / "sweep.json",
        {
            "schema": SCHEMA,
            "config": config_record(config),
            "data": {"source": shown_path(config.data), "sha256": sha256(config.data), "n_train": len(bench.train)},
            "seeds": [config.seed],
            "trials": [{**t.params, "validation_nll": t.value, **t.user_attrs} for t in finished],
            "environment": environment(device),
            "machine_dependent": [],
        },
    )
    best = finished[0]
    print(f"{folder}/sweep.json: {len(finished)} trials, best {best.params} at {best.value:.4f} nats per token")
