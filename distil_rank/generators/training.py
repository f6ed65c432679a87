"""What `train`, `pretrain` and `finetune` share: flags, the output folder, data and the record of a run."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distil_rank.core.errors import InputError
from distil_rank.generators.data import Encoded, Splits, encode, prepare, read_sequences
from distil_rank.generators.fit import Precision, Progress, Schedule, Teacher, checkpoints, fit
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import parameters, save, weights_sha256
from distil_rank.core.records import config_record, environment, read_json, require_writable, sha256, shown_path, write_json

SCHEMA = "distil-rank/generator-training/1"


@dataclass(frozen=True)
class TrainingFlags:
    data: Path  # proteins: FASTA (plain or gzip), or CSV, TSV or parquet with a column `sequence`
    out: Path  # folder of the model; a run that was interrupted here goes on
    train_size_prop: float = 1.0  # share of the training proteins that is used
    held_out: float = 0.05  # share of the proteins for validation, and as many for test
    max_residues: int | None = None  # leave longer proteins out (counted); without it they are an error
    epochs: float = 1.0  # passes over the training proteins
    steps: int | None = None  # steps instead of epochs
    batch_size: int = 32  # proteins per step, over all micro-batches and processes
    accumulation: int = 1  # micro-batches per step and process
    learning_rate: float = 1e-3  # peak
    warmup: float = 0.05  # share of the steps with rising learning rate
    weight_decay: float = 0.01  # of AdamW
    precision: Precision = "fp32"  # of the model's arithmetic; weights stay float32
    evaluate_every: int = 500  # steps between validations
    patience: int = 0  # validations without improvement before stopping; 0: never
    checkpoint_every: int = 500  # steps between checkpoints
    seed: int = 0  # of the split, the share, the initial weights and the batches
    device: str = "auto"  # cpu, cuda, or auto
    log_to: Literal["", "wandb", "trackio", "tensorboard"] = ""  # beside log.jsonl, which is always written
    stored: Literal["float32", "float16"] = "float32"  # type of the final weights on disk

    def schedule(self, proteins: int, published: bool = False) -> Schedule:
        per_epoch = math.ceil(proteins / self.batch_size)
        return Schedule(
            steps=self.steps or max(1, round(self.epochs * per_epoch)),
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            precision=self.precision,
            evaluate_every=self.evaluate_every,
            patience=self.patience,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
            published=published,
        )

    def check(self) -> None:
        """Everything that can be known before a protein is read."""
        if not 0 < self.train_size_prop <= 1:
            raise InputError(
                f"train-size-prop must be above 0 and at most 1, got {self.train_size_prop}; 0.1 is a tenth"
            )
        if not 0 < self.held_out < 0.5:
            raise InputError(f"held-out must be above 0 and below 0.5, got {self.held_out}; 0.05 is usual")
        if not self.epochs > 0 or (self.steps is not None and self.steps < 1):
            raise InputError(f"epochs above 0 (or steps of at least 1) required, got {self.epochs} and {self.steps}")
        self.schedule(1).check()
        choose_device(self.device)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"a device like cpu, cuda or cuda:1 required, got {name}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"a GPU required for {name}, got none; use --device cpu")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def join_processes(device: torch.device) -> None:
    """Join the others when started by torchrun or accelerate."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def claim_folder(flags: TrainingFlags) -> Path:
    """The output folder, made or to be resumed. Nothing that stands in it is deleted, and another run's is refused."""
    folder = require_writable(flags.out)
    started = folder / "started.json"
    wanted = {k: v for k, v in config_record(flags).items() if k not in ("out", "device", "log_to")}
    if (folder / "training.json").exists():
        raise InputError(f"a new output folder required, got {folder} with a finished training; choose another --out")
    if started.exists():
        before = read_json(started, SCHEMA)["config"]
        differing = [k for k in wanted if before.get(k) != wanted[k]]
        if differing:
            raise InputError(
                f"the flags that {folder} was started with required to resume it, got other {', '.join(differing)}; "
                "repeat them or choose another --out"
            )
    elif any(p.name not in ("checkpoints",) for p in folder.iterdir()):
        raise InputError(f"an empty or new output folder required, got {folder} with other files; choose another --out")
    write_json(started, {"schema": SCHEMA, "config": wanted})
    return folder


def load_splits(flags: TrainingFlags, identity: float = 0.3) -> Splits:
    sequences = read_sequences(flags.data)
    return prepare(sequences, flags.train_size_prop, flags.held_out, flags.seed, flags.max_residues, identity)


def run_training(
    flags: TrainingFlags,
    folder: Path,
    splits: Splits,
    tokenizer: Any,
    student: Any,
    teacher: Callable[[Encoded], Teacher | None],
    objective: Objective,
    more: dict[str, Any],
    published: bool = False,
) -> Progress:
    """Encode, fit, save and record; `more` goes into the record."""
    device = choose_device(flags.device)
    context = student.config.n_positions
    train, validation = (encode(part, tokenizer, context) for part in (splits.train, splits.validation))
    schedule = flags.schedule(len(train), published)
    source = teacher(train)
    student.to(device)
    resumed = bool(checkpoints(folder))
    print(
        f"{'resuming' if resumed else 'training'}: {len(train)} proteins, {int(train.lengths.sum())} tokens, "
        f"{schedule.steps} steps, {parameters(student)['total']} parameters, {device}",
        file=sys.stderr,
    )
    track, finish = _tracker(flags.log_to, folder, config_record(flags))
    progress = fit(student, train, validation, source, objective, schedule, folder, track)
    finish()
    if int(os.environ.get("RANK", "0")) != 0:
        return progress
    stored = torch.float16 if flags.stored == "float16" else torch.float32
    student.to("cpu", stored).float()  # what is on disk is what is hashed
    save(student, tokenizer, folder, stored)
    write_json(
        folder / "training.json",
        {
            "schema": SCHEMA,
            "config": config_record(flags),
            "data": {
                "source": shown_path(flags.data),
                "sha256": sha256(flags.data),
                **splits.counts,
                "n_train": len(train),
                "n_validation": len(validation),
                "n_test": len(splits.test),
                "test_sha256": splits.test_sha256,
            },
            "seeds": [flags.seed],
            "weights_sha256": weights_sha256(student),
            "parameters": parameters(student),
            "steps": progress.step,
            "best_step": progress.best_step,
            "validation_nll": progress.best_nll,
            "validation_perplexity": math.exp(progress.best_nll),
            "validations": progress.validations,
            **more,
            "environment": environment(device),
            "machine_dependent": [],
        },
    )
    return progress


def _tracker(
    name: str, folder: Path, config: dict[str, Any]
) -> tuple[Callable[[dict[str, Any]], None] | None, Callable[[], None]]:
    """Report to an experiment tracker, only when asked for."""
    if not name or int(os.environ.get("RANK", "0")) != 0:
        return None, lambda: None
    import importlib

    package = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise InputError(f"the package {name} required for --log-to {name}, got none; install it") from None
    if name == "tensorboard":
        writer = module.SummaryWriter(str(folder / "tensorboard"))

        def add(values: dict[str, Any]) -> None:
            for key, value in values.items():
                if key != "step":
                    writer.add_scalar(key, value, values["step"])

        return add, writer.close
    module.init(project="distil-rank", name=folder.name, config=config)
    return (lambda values: module.log(values, step=values["step"])), module.finish
