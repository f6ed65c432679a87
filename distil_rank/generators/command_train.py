"""Distill a protein generator into a smaller GPT-2.

    distil-rank generator prepare uniref50.fasta.gz --tokenizer nferruz/ProtGPT2 --context 1024 \\
        --split-by random --train-size-prop 0.1 --out shards
    distil-rank generator train --teacher nferruz/ProtGPT2 --data shards --out tiny \\
        --n-layer 4 --n-head 4 --n-embd 512 --tau 2 --alpha 0.5 --steps 20000
    distil-rank generator train ... --uncertainty --calibration-smoothing
    distil-rank generator train ... --dry-run        # memory and time on some GPUs
    torchrun --nproc-per-node 8 -m distil_rank generator train ...

An interrupted run goes on where its checkpoint stands when the same command is given again. Sizes:
tiny 4 layers, 4 heads, 512 wide; small 6, 8, 768; medium 12, 16, 1024.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError, at_least, at_most
from distil_rank.core.randomness import generator
from distil_rank.core.records import (
    Record,
    config_record,
    environment,
    require_writable,
    shown_path,
    write_json,
)
from distil_rank.generators.data import Encoded
from distil_rank.generators.estimate import expected
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import (
    initial_student,
    load,
    parameters,
    require_same_vocabulary,
    save,
    weights_sha256,
)
from distil_rank.generators.prepared import Prepared
from distil_rank.generators.teachers import Cache, Live, Teacher
from distil_rank.generators.train import (
    CHECKPOINT,
    SCHEMA,
    Progress,
    Schedule,
    fit,
    make_accelerator,
    mean_nll,
)


@dataclass(frozen=True)
class ShapeFlags:
    """The network of a new student."""

    n_layer: int = 4  # layers of the network
    n_head: int = 4  # attention heads
    n_embd: int = 256  # width of the network

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, heads and width; InputError where no network has them."""
        layers, heads, width = self.n_layer, self.n_head, self.n_embd
        at_least(1, n_layer=layers, n_head=heads, n_embd=width)
        if width % heads:
            raise InputError(
                f"n-embd must be divisible by n-head, got n-embd={width} and n-head={heads};"
                f" {(width // heads + 1) * heads} would do"
            )
        return layers, heads, width


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(Schedule):
    """What `train`, `pretrain` and `finetune` share."""

    data: Path  # folder that `generator prepare` made
    out: Path  # where to write
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one
    log_to: Literal["", "wandb", "trackio", "tensorboard"] = ""  # beside log.jsonl
    store_dtype: Literal["float32", "float16"] = "float32"  # of stored embeddings or weights

    @property
    def schedule(self) -> Schedule:
        return Schedule(**{f.name: getattr(self, f.name) for f in fields(Schedule)})


@dataclass(frozen=True, kw_only=True)
class Config(ShapeFlags, TrainingFlags):
    teacher: str  # a generator by folder or name on the Hugging Face hub
    tau: float = 2.0  # temperature that softens both distributions
    alpha: float = 0.5  # weight of the cross-entropy to the tokens; the rest: of the divergence
    uncertainty: bool = False  # weight positions by the teacher's entropy
    calibration_smoothing: bool = False  # smooth the teacher where it is unsure
    smoothing: float = 0.1  # strength of --calibration-smoothing
    init: Literal["random", "slice"] = "random"  # or from the teacher's weights
    teacher_cache: bool = False  # ask the teacher once about each protein
    dry_run: bool = False  # stop before anything is trained or uploaded

    @property
    def objective(self) -> Objective:
        enhancements = (self.uncertainty, self.calibration_smoothing, self.smoothing)
        return Objective(self.tau, self.alpha, *enhancements)


def run(config: Config) -> None:
    config.objective.check()
    shape = config.shape
    if config.dry_run:
        config.schedule.check()
        print(expected(config, Prepared(config.data)))
        return
    prepared = begin(config)
    teacher, tokenizer = load(config.teacher)
    require_same_vocabulary(tokenizer, prepared.tokenizer)
    student = initial_student(teacher, *shape, config.init, config.seed)
    teacher.to(pick_device(config.device))

    def source(train: Encoded) -> Teacher:
        kept = config.teacher_cache
        return Cache(teacher, train, config.dtype) if kept else Live(teacher, config.dtype)

    origin = {"name": config.teacher, "weights_sha256": weights_sha256(teacher)}
    described = {"teacher": origin | {"parameters": parameters(teacher)}}
    more = {"kind": "distilled", "objective": asdict(config.objective), **described}
    run_training(config, prepared, student, config.objective, more, source)


def begin(flags: TrainingFlags) -> Prepared:
    """Refuse what can be refused before a model is read; returns the proteins."""
    flags.schedule.check()
    if flags.log_to and importlib.util.find_spec(flags.log_to) is None:
        raise InputError(f"the package {flags.log_to} required for --log-to, got none; install it")
    device = pick_device(flags.device)
    if flags.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(1, device=device))
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            required = f"a compiler required for --compile ({reason})"
            raise InputError(f"{required}; leave it out") from None
    chief = make_accelerator(device, flags.dtype).is_main_process
    prepared = Prepared(flags.data)
    if not chief:
        return prepared
    folder = require_writable(flags.out)
    found = {path.name for path in folder.iterdir()}
    if "training.json" in found:
        raise InputError(f"a new --out required, got {folder} with a finished training")
    # a log alone: a training that was killed; what else it left is written again
    if "log.jsonl" not in found and found - {flags.log_to and "distil-rank"}:
        raise InputError(f"an empty or new --out required, got {folder} with other files")
    return prepared


def run_training(
    flags: TrainingFlags,
    prepared: Prepared,
    student: Any,
    objective: Objective,
    more: Record,
    source: Callable[[Encoded], Teacher | None] = lambda train: None,
    subset: int | None = None,
) -> None:
    """Fit on all training proteins or a subset, save and record; `more` goes into the record."""
    device, folder, schedule = pick_device(flags.device), flags.out, flags.schedule
    train, validation = prepared.training_parts(student)
    if subset is not None:
        at_least(1, subset=subset)
        at_most(len(train), subset=subset)
        order = torch.randperm(len(train), generator=generator(flags.seed, "subset"))
        train = train.take(order[:subset].sort().values.numpy())
    left_out = ("data", "out", "device", "log_to")
    told = {k: v for k, v in config_record(flags).items() if k not in left_out}
    trackers = {"log_with": flags.log_to or None, "project_dir": folder}
    accelerator = make_accelerator(device, flags.dtype, **trackers)
    accelerator.init_trackers("distil-rank", told, {"wandb": {"name": folder.name}})
    print(
        f"{'resuming' if (folder / CHECKPOINT).exists() else 'training'}: {len(train)} proteins, "
        f"{train.lengths.sum()} tokens, {schedule.steps} steps "
        f"({schedule.steps * schedule.batch_size / len(train):.2f} passes), "
        f"{parameters(student)['total']} parameters, {device}",
        file=sys.stderr,
    )
    before = mean_nll(student.to(device), validation, schedule.dtype)

    def tell(values: dict[str, float]) -> None:
        accelerator.log(values, step=int(values["step"]))

    targets, request = source(train), [told, more]
    given = (objective, schedule, folder, tell, request)
    progress = fit(student, train, validation, targets, *given)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    own = mean_nll(student, train.take(range(min(len(train), len(validation)))), schedule.dtype)
    tokens = progress.step * schedule.batch_size * train.lengths.mean()
    worth = {
        "proteins": len(train),
        "validation_nll_before": before,
        "train_nll": own,
        "gap": progress.best_nll - own,  # what is gained on proteins that were trained on only
        "cost": {"tokens": round(tokens), "seconds": progress.seconds},
    }
    finish(flags, prepared, student, progress, more | {"fit": worth})


def finish(
    flags: TrainingFlags, prepared: Prepared, student: Any, progress: Progress, more: Record
) -> None:
    """Write the weights, then the record, which makes the training a finished one."""
    folder, fit = flags.out, more["fit"]
    stored = torch.float16 if flags.store_dtype == "float16" else torch.float32
    student.to("cpu", stored).float()  # what is on disk is what is hashed
    save(student, prepared.tokenizer, folder, stored)
    record = {
        "schema": SCHEMA,
        "config": config_record(flags),
        "data": {"folder": shown_path(flags.data)} | prepared.summary(),
        "seeds": [flags.seed],
        "weights_sha256": weights_sha256(student),
        "parameters": parameters(student),
        "steps": progress.step,
        "best_step": progress.best_step,
        "validation_nll": progress.best_nll,
        "validation_perplexity": math.exp(progress.best_nll),
        "validations": progress.validations,
        **more,
        "environment": environment(pick_device(flags.device)),
        "machine_dependent": ["fit.cost.seconds"],
    }
    write_json(folder / "training.json", record)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    found = f"{progress.best_nll:.4f} at step {progress.best_step}"
    print(
        f"{folder}: nats per token: validation {found}, {fit['validation_nll_before']:.4f} before;"
        f" training {fit['train_nll']:.4f}"
    )
