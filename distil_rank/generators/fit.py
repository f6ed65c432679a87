"""The training loop: any number of micro-batches and processes, one gradient; resumes bit for bit; keeps the best
weights.

Step s uses the same proteins in the same order whatever was interrupted before: batches are a function of (seed,
epoch), and nothing else is random (no dropout). Under `torchrun` (or `accelerate launch`) each process takes its
share of the micro-batches and gradients are summed; every gradient is divided by the number of predictions of the
whole batch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.generators.data import Encoded, epoch_batches
from distil_rank.generators.loss import Objective, TopTargets, distillation_sums, published_loss
from distil_rank.generators.models import write_safetensors
from distil_rank.core.records import write_json

Precision = Literal["fp32", "bf16", "fp16"]
FINAL_RATE = 0.1  # the learning rate falls along a cosine to this share of its peak


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; part of what makes two runs comparable."""

    steps: int
    batch_size: int = 32  # proteins per step, over all micro-batches and processes
    accumulation: int = 1  # micro-batches per step and process
    learning_rate: float = 1e-3  # peak
    warmup: float = 0.05  # share of the steps with rising learning rate
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    precision: Precision = "fp32"
    evaluate_every: int = 0  # steps between validations; 0: at the end only
    patience: int = 0  # validations without improvement before stopping; 0: never stop early
    checkpoint_every: int = 0  # steps between checkpoints; 0: none
    seed: int = 0
    published: bool = False  # the published formula, means per micro-batch

    def check(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise InputError(f"learning-rate must be above 0, got {self.learning_rate}; 1e-3 is a good start")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup must be a share between 0 and 1, got {self.warmup}; 0.05 is usual")

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ... steps - 1: linear warm-up, then cosine to a tenth."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        along = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * along)))


class Teacher(Protocol):
    """Where targets come from: a model (`teachers.Live`) or what was kept of it (`teachers.Cache`)."""

    def targets(self, indices: NDArray[np.int64], tokens: Tensor, mask: Tensor) -> Tensor | TopTargets: ...


@dataclass
class Progress:
    """What a run has reached; written into every checkpoint."""

    step: int = 0
    best_nll: float = math.inf
    best_step: int = 0
    stale: int = 0  # validations since the best
    predictions_seen: int = 0
    validations: list[list[float]] = field(default_factory=list)  # [step, nll]


def fit(
    student: Any,
    train: Encoded,
    validation: Encoded | None,
    teacher: Teacher | None,
    objective: Objective,
    schedule: Schedule,
    folder: Path | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Progress:
    """Train `student` in place; ends with the weights that were best on `validation` (the last without one).

    With a folder: resumes from its newest checkpoint, and writes `log.jsonl`, checkpoints and the best weights there.
    """
    objective.check()
    schedule.check()
    device = next(student.parameters()).device
    rank, world = _place()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=schedule.precision == "fp16")
    progress, best = Progress(), None
    if folder is not None:
        progress = _restore(folder, student, optimizer, scaler)
    log = _Log(folder if rank == 0 else None, progress.step, report)
    lengths = train.lengths
    student.train()
    for step, batch in _steps(lengths, schedule, progress.step):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        pieces = [p for p in np.array_split(batch, schedule.accumulation * world) if len(p)]
        total = int((lengths[batch] - 1).sum())
        sums = torch.zeros(3, dtype=torch.float64)
        for piece in pieces[rank::world]:
            tokens, mask = (x.to(device) for x in train.batch(piece))
            targets = None if teacher is None else teacher.targets(piece, tokens, mask)
            with autocast(device, schedule.precision):
                logits = student(input_ids=tokens, use_cache=False).logits  # padding is on the right: causal is enough
            if schedule.published:
                if not isinstance(targets, Tensor):
                    raise InputError(
                        "the published formula needs the teacher's full logits; use no cache or the exact one"
                    )
                labels = tokens.masked_fill(tokens == train.end, -100)
                loss = published_loss(logits, targets, labels, mask, objective) / len(pieces)
                sums[0] += loss.detach().cpu()
            else:
                found = distillation_sums(logits, targets, tokens, mask, objective)
                loss = found.loss / total
                sums += torch.stack([found.loss.detach(), found.hard, found.soft]).cpu() / total
            scaler.scale(loss).backward()
        _add_up(student, sums, world)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), schedule.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(sums[0]):
            raise InputError(
                f"a finite loss required, got {sums[0]} at step {step + 1}; use a lower learning rate or bf16"
            )
        progress.step = step + 1
        progress.predictions_seen += total
        last = progress.step == schedule.steps
        log.write(
            step=progress.step,
            loss=float(sums[0]),
            hard=float(sums[1]),
            soft=float(sums[2]),
            learning_rate=schedule.rate(step),
            gradient_norm=float(norm),
        )
        stop = False
        if validation is not None and (
            last or (schedule.evaluate_every and progress.step % schedule.evaluate_every == 0)
        ):
            nll = mean_nll(student, validation, schedule.precision)
            student.train()
            progress.validations.append([progress.step, nll])
            log.write(step=progress.step, validation_nll=nll)
            progress.stale += 1
            if nll < progress.best_nll:
                progress.best_nll, progress.best_step, progress.stale = nll, progress.step, 0
                best = _keep_best(student, folder, rank)
            stop = bool(schedule.patience) and progress.stale >= schedule.patience
        if folder and rank == 0 and schedule.checkpoint_every and progress.step % schedule.checkpoint_every == 0:
            _checkpoint(folder, student, optimizer, scaler, progress)
        if stop:
            break
    log.close()
    if progress.best_step and progress.best_step != progress.step:
        if folder is not None:
            from safetensors.torch import load_file

            best = load_file(folder / "best.safetensors")
        assert best is not None
        student.load_state_dict(best, strict=False)
    student.eval()
    return progress


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


@torch.no_grad()
def mean_nll(model: Any, proteins: Encoded, precision: Precision = "fp32", batch_size: int = 64) -> float:
    """Mean negative log-likelihood per predicted token, in nats."""
    model.eval()
    device = next(model.parameters()).device
    nll, count = 0.0, 0
    for batch in proteins.in_order_of_length(batch_size):
        tokens, mask = (x.to(device) for x in proteins.batch(batch))
        with autocast(device, precision):
            logits = model(input_ids=tokens, use_cache=False).logits
        sums = distillation_sums(logits, None, tokens, mask, Objective())
        nll, count = nll + float(sums.hard), count + sums.n
    return nll / count


def _steps(lengths: NDArray[np.int64], schedule: Schedule, first: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    per_epoch = math.ceil(len(lengths) / schedule.batch_size)
    epoch, batches = -1, []
    from tqdm import tqdm

    steps = range(first, schedule.steps)
    for step in tqdm(
        steps, initial=first, total=schedule.steps, unit="step", disable=not sys.stderr.isatty(), leave=False
    ):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            batches = epoch_batches(lengths, schedule.batch_size, schedule.seed, epoch)
        yield step, batches[step % per_epoch]


def _place() -> tuple[int, int]:
    """Rank and number of processes."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _add_up(student: Any, sums: Tensor, world: int) -> None:
    """Sum gradients and logged values over the processes."""
    if world == 1:
        return
    import torch.distributed as dist

    device = next(student.parameters()).device
    for parameter in student.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    shared = sums.to(device)
    dist.all_reduce(shared)
    sums.copy_(shared)


def _state(student: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone().contiguous() for k, v in student.state_dict().items() if k != "lm_head.weight"}


def _keep_best(student: Any, folder: Path | None, rank: int) -> dict[str, Tensor] | None:
    if folder is None:
        return _state(student)
    if rank == 0:
        write_safetensors(_state(student), folder / "best.safetensors")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first, by number of steps (10000 after 5000)."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def _checkpoint(folder: Path, student: Any, optimizer: Any, scaler: Any, progress: Progress) -> None:
    """Write aside, then rename: a checkpoint that has its name is whole. The one before is kept, older ones are not."""
    final = folder / "checkpoints" / f"step-{progress.step}"
    aside = final.with_name(f"writing-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_safetensors(_state(student), aside / "model.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, aside / "optimizer.pt")
    finite = asdict(progress) | {"best_nll": progress.best_nll if progress.best_step else None}
    write_json(aside / "progress.json", finite)
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def _restore(folder: Path, student: Any, optimizer: Any, scaler: Any) -> Progress:
    found = checkpoints(folder)
    if not found:
        return Progress()
    from safetensors.torch import load_file

    student.load_state_dict(load_file(found[-1] / "model.safetensors"), strict=False)
    state = torch.load(found[-1] / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    progress = Progress(**json.loads((found[-1] / "progress.json").read_text()))
    progress.best_nll = math.inf if progress.best_nll is None else progress.best_nll
    return progress


class _Log:
    """`log.jsonl`, one object a line; lines after the step resumed from are dropped, since they come again."""

    def __init__(self, folder: Path | None, step: int, report: Callable[[dict[str, Any]], None] | None):
        self.report, self.file = report, None
        if folder is not None:
            path = folder / "log.jsonl"
            kept = []
            for line in path.read_text().splitlines() if path.exists() else []:
                with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
            path.write_text("".join(f"{line}\n" for line in kept))
            self.file = path.open("a", buffering=1)

    def write(self, **values: float) -> None:
        if self.file:
            self.file.write(json.dumps(values) + "\n")
        if self.report:
            self.report(values)

    def close(self) -> None:
        if self.file:
            self.file.close()
