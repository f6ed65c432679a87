"""The training loop, on `accelerate`: any number of micro-batches and processes, one gradient.

Step s uses the same proteins in the same order whatever was interrupted before: batches are a
function of (seed, epoch), and nothing else is random (models stay in evaluation mode: no dropout).
Under `torchrun` or `accelerate launch` each process takes its share of the micro-batches, gradients
are summed, and each is divided by the number of predictions of the whole batch.

What `accelerate` does not do, and is done here: its loop has means over equal shares (DDP), ours
sums over unequal ones; its prepared model makes all logits, in float32, a (b, l, V) array; its
`save_state` writes in place, so a kill leaves half a checkpoint, it stores no step of ours and no
best weights, replaces the global random state, and loads what another request has left.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from distil_rank.core.errors import InputError, above, at_least, at_most
from distil_rank.core.records import Record
from distil_rank.core.resume import Checkpoint
from distil_rank.generators.data import Encoded, epoch_batches
from distil_rank.generators.loss import Objective, distillation_sums
from distil_rank.generators.models import Dtype, make_optimizers, own_weights, weights_sha256
from distil_rank.generators.teachers import Teacher, read

SCHEMA = "distil-rank/generator-training/1"  # of training.json
CHECKPOINT = "checkpoint.pt"
CLIP = 1.0  # largest norm of the gradient
FINAL_RATE = 0.1  # the learning rate falls along a cosine to this share of its peak
Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; part of what makes two runs comparable."""

    steps: int = 1000  # steps of the optimizer
    batch_size: int = 32  # proteins per step
    accumulation: int = 1  # micro-batches per step and process
    learning_rate: float = 1e-3  # at its peak
    warmup: float = 0.05  # share of the steps with rising learning rate
    weight_decay: float = 0.01  # of the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the matrices, learns from less data
    dtype: Dtype = "float32"  # arithmetic
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    compile: bool = False  # the student by torch.compile; needs a compiler
    evaluate_every: int = 500  # steps between validations
    save_every: int = 200  # steps between checkpoints
    seed: int = 0  # of everything random

    def check(self) -> None:
        """Raise InputError on values outside their range."""
        at_least(1, steps=self.steps, batch_size=self.batch_size, accumulation=self.accumulation)
        at_least(0, weight_decay=self.weight_decay, warmup=self.warmup)
        at_least(0, evaluate_every=self.evaluate_every, save_every=self.save_every)
        at_most(1, warmup=self.warmup)
        above(0, learning_rate=self.learning_rate)

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ... steps - 1: linear warm-up, then cosine to a tenth."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        along = (step - rising) / max(1, self.steps - rising)
        cosine = 0.5 * (1 + math.cos(math.pi * along))
        return self.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

    def batches(self, lengths: NDArray[np.int64], first: int) -> Iterator[NDArray[np.int64]]:
        """The proteins of step `first` and of all that follow."""
        per_epoch = math.ceil(len(lengths) / self.batch_size)
        for epoch in range(first // per_epoch, math.ceil(self.steps / per_epoch)):
            start = epoch * per_epoch
            batches = epoch_batches(lengths, self.batch_size, self.seed, epoch)
            yield from batches[max(0, first - start) : self.steps - start]


@dataclass
class Progress:
    """What a run has reached; written into every checkpoint."""

    step: int = 0
    best_nll: float = math.inf
    best_step: int = 0
    logged: int = 0  # bytes of log.jsonl
    validations: list[list[float]] = field(default_factory=list)  # [step, nll]
    seconds: float = 0.0  # in all sessions


def make_accelerator(device: torch.device, dtype: Dtype, **more: Any) -> Any:
    """accelerate's Accelerator for a device and a type, which joins the processes of a launcher."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if dtype == "float16" and device.type == "cpu":  # accelerate would compute in float32
        raise InputError("a GPU required for --dtype float16, got cpu; use bfloat16")
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    # a second run in this process may have another device and type; accelerate would keep the first
    AcceleratorState._reset_state(reset_partial_state=True)
    fixed = {"cpu": device.type == "cpu", "device_placement": False}
    return Accelerator(mixed_precision=precision, **fixed, **more)


def fit(
    student: Any,
    train: Encoded,
    validation: Encoded | None,
    source: Teacher | None,
    objective: Objective,
    schedule: Schedule,
    folder: Path | None = None,
    report: Report | None = None,
    request: object = None,
) -> Progress:
    """Train `student` in place; ends with the weights best on `validation` (the last without one).

    With a folder: `log.jsonl` is written there, and a checkpoint, with which the same call goes on;
    what the loop cannot see but the result depends on (the teacher) belongs into `request`.
    """
    accelerator = make_accelerator(student.device, schedule.dtype)
    optimizers = [
        accelerator.prepare(o)
        for o in make_optimizers(student, schedule.optimizer, schedule.weight_decay)
    ]
    state, kept = _State(student, optimizers, accelerator.scaler), None
    if folder is not None and schedule.save_every:
        data = [part.sha256 for part in (train, validation) if part is not None]
        known = (schedule, objective, weights_sha256(student), *data, request)
        kept = Checkpoint(folder / CHECKPOINT, *known)
        state.restore(kept.load())
    progress = state.progress
    log = None
    if folder is not None and accelerator.is_main_process:  # one object a line
        log = (folder / "log.jsonl").open("a", buffering=1)
        log.truncate(progress.logged)  # what stands after the checkpoint comes again

    def tell(**values: float) -> None:
        if log:
            log.write(json.dumps(values) + "\n")
        if report:
            report(values)

    set_mode(student, schedule)
    start = time.perf_counter() - progress.seconds
    shown = {"initial": progress.step, "total": schedule.steps, "unit": "step", "leave": False}
    batches = schedule.batches(train.lengths, progress.step)
    for batch in tqdm(batches, disable=not sys.stderr.isatty(), **shown):
        means = _gradient(accelerator, student, train, batch, source, objective, schedule)
        update = _update(accelerator, student, optimizers, schedule, progress.step)
        progress.step, progress.seconds = progress.step + 1, time.perf_counter() - start
        tell(step=progress.step, **means, **update)
        due = schedule.evaluate_every and progress.step % schedule.evaluate_every == 0
        if validation is not None and (due or progress.step == schedule.steps):
            nll = mean_nll(student, validation, schedule.dtype)
            tell(step=progress.step, validation_nll=nll)
            state.judge(nll)
        if kept and log and progress.step % schedule.save_every == 0:
            progress.logged = log.tell()
            kept.save(state.record())
    if log:
        log.close()
    student.load_state_dict(state.best, strict=False)  # without the head, tied to the embeddings
    return progress


def set_mode(student: Any, schedule: Schedule) -> None:
    """No dropout; checkpointing and compilation where asked for."""
    student.eval()  # in which transformers' own checkpointing does nothing
    for block in student.transformer.h if schedule.gradient_checkpointing else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if schedule.compile:
        student.transformer.compile()


def _gradient(
    accelerator: Any,
    student: Any,
    train: Encoded,
    batch: NDArray[np.int64],
    source: Teacher | None,
    objective: Objective,
    schedule: Schedule,
) -> dict[str, float]:
    """Add the gradient of the batch's mean loss; returns the means of loss, hard and soft part."""
    total = int((train.offsets[batch + 1] - train.offsets[batch] - 1).sum())
    pieces = np.array_split(batch, schedule.accumulation * accelerator.num_processes)
    pieces = [piece for piece in pieces if len(piece)]
    means = torch.zeros(3, dtype=torch.float64, device=student.device)
    for piece in pieces[accelerator.process_index :: accelerator.num_processes]:
        tokens, mask = (x.to(student.device) for x in train.batch(piece))
        targets = None if source is None else source.targets(piece, tokens, mask)
        # padding is on the right: causal attention needs no mask
        logits = read(student, tokens, schedule.dtype)
        found = distillation_sums(logits, targets, tokens, mask, objective, train.layout)
        accelerator.backward(found.loss / total)
        means += torch.stack([found.loss.detach(), found.hard, found.soft]) / total
    if accelerator.num_processes > 1:
        for parameter in student.parameters():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(own)
        means = accelerator.reduce(means)
    if not torch.isfinite(means[0]):
        raise InputError(
            f"a finite loss required, got {means[0]}; use a lower --learning-rate, or --dtype "
            "bfloat16 instead of float16"
        )
    return dict(zip(("loss", "hard", "soft"), means.tolist()))


def _update(
    accelerator: Any, student: Any, optimizers: list[Any], schedule: Schedule, step: int
) -> dict[str, float]:
    """One step of the optimizers; returns the rate and the gradient's norm before clipping."""
    rate = schedule.rate(step)
    norm = accelerator.clip_grad_norm_(student.parameters(), CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        optimizer.zero_grad()
    return {"learning_rate": rate, "gradient_norm": float(norm)}


@torch.no_grad()
def mean_nll(model: Any, proteins: Encoded, dtype: Dtype = "float32") -> float:
    """Mean negative log-likelihood per predicted token, in nats."""
    nll, count = 0.0, 0
    for batch in proteins.in_order_of_length():
        tokens, mask = (x.to(model.device) for x in proteins.batch(batch))
        sums = distillation_sums(read(model, tokens, dtype), None, tokens, mask, Objective())
        nll, count = nll + float(sums.hard), count + sums.n
    return nll / count


class _State:
    """All that changes from step to step; a checkpoint is its record."""

    def __init__(self, student: Any, optimizers: list[Any], scaler: Any):
        self.student, self.parts = student, [student, *optimizers, *([scaler] if scaler else [])]
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}

    def judge(self, nll: float) -> None:
        """Note a validation; keep the weights if they are the best so far."""
        progress = self.progress
        progress.validations.append([progress.step, nll])
        if nll < progress.best_nll:
            progress.best_nll, progress.best_step = nll, progress.step
            self.best = {k: v.to("cpu", copy=True) for k, v in own_weights(self.student).items()}

    def record(self) -> Record:
        parts = [part.state_dict() for part in self.parts]
        return {"parts": parts, "best": self.best, "progress": asdict(self.progress)}

    def restore(self, record: Record | None) -> None:
        if record is None:
            return
        for part, saved in zip(self.parts, record["parts"], strict=True):
            part.load_state_dict(saved)
        self.progress, self.best = Progress(**record["progress"]), record["best"]
