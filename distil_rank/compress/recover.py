"""A short distillation of the factors against the dense model, after the closed form: logits KL + hidden-state MSE.

Seeded and resumable: with a checkpoint path, an interrupted recovery goes on where it stopped and ends in the same weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.compress.architectures import Architecture
from distil_rank.core.lowrank import LowRankLinear
from distil_rank.compress.sites import Batch, evaluating, tokens_of
from distil_rank.core.randomness import generator

SAVE_EVERY = 50  # steps
CHECKED = 16  # batches on which the result must beat the start


def recover(
    architecture: Architecture,
    dense: nn.Module,
    small: nn.Module,
    batches: Sequence[Batch],
    steps: int = 200,
    lr: float = 1e-3,
    hidden_weight: float = 1.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> tuple[nn.Module, list[float]]:
    """A copy of `small` whose factors were trained for `steps` AdamW steps (short warm-up, linear decay), and
    the loss of every step. Where training has not lowered the loss of the first batches, the start is given back.

    loss = KL(dense || small) per token + hidden_weight * MSE of the last hidden state / its variance, over residues; of masked
    models a seventh of the residues is masked, in a new random phase every step.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    student = copy.deepcopy(small).requires_grad_(False)
    parameters = [p for m in student.modules() if isinstance(m, LowRankLinear) for p in m.parameters()]
    if not parameters:
        raise InputError("a model with low-rank layers required for recovery, all of them stayed dense")
    for p in parameters:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
    from tqdm import tqdm

    draws = generator(seed, "recovery batches")
    order = torch.randint(len(batches), (steps,), generator=draws)
    phases = torch.randint(7, (steps,), generator=draws)
    path = None if checkpoint is None else Path(checkpoint)
    setting = json.dumps([steps, lr, hidden_weight, seed, _digest([*parameters, *map(_tokens, batches)])])
    losses = _resume(path, setting, parameters, optimiser)
    with evaluating(dense), evaluating(student):
        done = len(losses)
        for step in tqdm(range(done, steps), initial=done, total=steps, unit="step", desc="recovery", disable=None):
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / max(1, steps // 10)) * (1 - step / steps)
            value = _loss(architecture, dense, student, batches[int(order[step])], int(phases[step]), hidden_weight)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            losses.append(float(value.detach()))
            if path is not None and (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
                _save(path, setting, parameters, optimiser, losses)
        with torch.no_grad():
            first = batches[:CHECKED]
            start, end = (
                sum(float(_loss(architecture, dense, m, b, 0, hidden_weight)) for b in first) for m in (small, student)
            )
    if path is not None:
        path.unlink(missing_ok=True)
    if not end < start:
        student = copy.deepcopy(small)
    return student.requires_grad_(False), losses


def _loss(
    architecture: Architecture, dense: nn.Module, student: nn.Module, batch: Batch, phase: int, hidden_weight: float
) -> Tensor:
    residues = architecture.residues(dense, batch)
    if not architecture.causal:
        batch = architecture.masked(batch, residues & (residues.cumsum(1) % 7 == phase))
    if not architecture.has_logits:
        with torch.no_grad():
            target = architecture.hidden(dense, batch)[residues]
        return hidden_weight * _relative(architecture.hidden(student, batch)[residues], target)
    with torch.no_grad():
        logits, hidden = architecture.both(dense, batch)
        before, target = logits[residues].log_softmax(-1), hidden[residues]
    logits, hidden = architecture.both(student, batch)
    after = logits[residues].log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    return divergence + hidden_weight * _relative(hidden[residues], target)


def _relative(x: Tensor, target: Tensor) -> Tensor:
    return (x - target).square().sum(-1).mean() / (target - target.mean(0)).square().sum(-1).mean().clamp_min(1e-12)


def _tokens(batch: Batch) -> Tensor:
    tokens = tokens_of(batch)
    assert tokens is not None
    return tokens


def _digest(tensors: Sequence[Tensor]) -> str:
    """Of start and data: a checkpoint of others must not be gone on with."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(
    path: Path, setting: str, parameters: Sequence[Tensor], optimiser: torch.optim.Optimizer, losses: list[float]
) -> None:
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for i, p in enumerate(parameters):
        state = optimiser.state[p]
        tensors |= {
            f"{i}.p": p.detach(),
            f"{i}.m": state["exp_avg"],
            f"{i}.v": state["exp_avg_sq"],
            f"{i}.t": state["step"],
        }
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"setting": setting})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _resume(
    path: Path | None, setting: str, parameters: Sequence[Tensor], optimiser: torch.optim.Optimizer
) -> list[float]:
    """Losses so far, with parameters and optimiser as they were; [] where there is nothing to resume."""
    if path is None or not path.is_file():
        return []
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("setting") != setting:
            raise InputError(
                f"a checkpoint of this very recovery required, {path} is of another; remove it to start anew"
            )
        losses = file.get_tensor("losses").tolist()
        for i, p in enumerate(parameters):
            with torch.no_grad():
                p.copy_(file.get_tensor(f"{i}.p"))
            keys = {"exp_avg": "m", "exp_avg_sq": "v", "step": "t"}
            optimiser.state[p] = {key: file.get_tensor(f"{i}.{short}") for key, short in keys.items()}
    return losses
