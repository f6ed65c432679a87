"""A short distillation of the smaller layers against the dense model, after the closed form.

Seeded and resumable: an interrupted recovery goes on where it stopped and ends in the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distil_rank.compress.architectures import PHASES, Architecture
from distil_rank.compress.sites import Batch, evaluating
from distil_rank.core.errors import InputError
from distil_rank.core.linear import LowRankLinear, PrunedLinear
from distil_rank.core.randomness import generator
from distil_rank.core.resume import Checkpoint

LEARNING_RATE = 1e-3
SAVE_EVERY = 50  # steps
CHECKED = 16  # batches on which the result must beat the start


def recover(
    architecture: Architecture,
    dense: nn.Module,
    small: nn.Module,
    batches: Sequence[Batch],
    steps: int,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    learning_rate: float = LEARNING_RATE,
) -> tuple[nn.Module, list[float]]:
    """A copy of `small` with trained smaller layers, and the loss of every step.

    AdamW, short warm-up, linear decay, on KL(dense || small) per prediction + MSE of the last
    hidden state / its variance, over residues; of masked models a seventh of the residues is
    masked, in a new random phase every step. Unless that lowers the loss of the first batches,
    `small` itself is returned.
    """
    student = copy.deepcopy(small).requires_grad_(False)
    layers = [m for m in student.modules() if isinstance(m, LowRankLinear | PrunedLinear)]
    parameters = [p.requires_grad_(True) for m in layers for p in m.parameters()]
    if not parameters:
        raise InputError(
            "a model with compressed layers required for recovery, all of them stayed dense"
        )
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    from tqdm import trange

    draws = generator(seed, "recovery batches")
    order = torch.randint(len(batches), (steps,), generator=draws).tolist()
    phases = torch.randint(PHASES, (steps,), generator=draws).tolist()
    losses: list[float] = []
    if checkpoint is not None and (state := checkpoint.load()):
        losses = state["losses"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, value in zip(parameters, state["parameters"]):
                p.copy_(value)
    done = len(losses)
    with evaluating(dense), evaluating(student):
        for step in trange(done, steps, initial=done, total=steps, desc="recovery", disable=None):
            scale = min(1.0, (step + 1) / max(1, steps // 10)) * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * scale
            value = _loss(architecture, dense, student, batches[order[step]], phases[step])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
            if checkpoint is not None and (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
                values = [p.detach() for p in parameters]
                state = {"parameters": values, "optimizer": optimizer.state_dict()}
                checkpoint.save({**state, "losses": losses})
        start, end = (_first(architecture, dense, m, batches) for m in (small, student))
    if checkpoint is not None:
        checkpoint.clear()
    return (student.requires_grad_(False) if end < start else small), losses


@torch.no_grad()
def _first(
    architecture: Architecture, dense: nn.Module, model: nn.Module, batches: Sequence[Batch]
) -> float:
    """Loss of the first batches."""
    return sum(float(_loss(architecture, dense, model, b, 0)) for b in batches[:CHECKED])


def _loss(
    architecture: Architecture, dense: nn.Module, student: nn.Module, batch: Batch, phase: int
) -> Tensor:
    residues = architecture.residues(batch)
    if architecture.task == "masked":
        batch = architecture.masked(batch, architecture.phase(batch, phase))
    with torch.no_grad():
        target, before = architecture.read(dense, batch)
    x, after = architecture.read(student, batch)
    loss = _fvu(x[residues], target[residues])
    if before is None or after is None:
        return loss
    if architecture.predicts_numbers:
        return loss + _fvu(*(y[residues] if y.ndim == 3 else y for y in (after, before)))
    (p, where), (q, _) = (architecture.scored(y, batch) for y in (before, after))
    where = residues if architecture.task == "masked" else where
    return (p.exp() * (p - q))[where].flatten(1).sum(-1).mean() + loss


def _fvu(x: Tensor, target: Tensor) -> Tensor:
    """Squared error of rows (n, d) over the variance of the target."""
    spread = (target - target.mean(0)).square().sum(-1).mean().clamp_min(1e-12)
    return (x - target).square().sum(-1).mean() / spread
