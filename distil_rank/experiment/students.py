"""Students by distillation (AdamW on MSE + cosine_weight (1 - cosine)), and by shrinkage."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distil_rank.core.lowrank import optimum
from distil_rank.core.moments import Moments
from distil_rank.core.prior import blended, blended_moments, merged, weights_own
from distil_rank.core.records import Record

RATES = (3e-3, 1e-3, 3e-4)  # learning rates that a pilot chooses from


@dataclass(frozen=True)
class Recipe:
    """How the factors are trained after the warm start."""

    steps: int = 1000
    batch: int = 64  # rows drawn, with replacement, in every step
    lr: float = 3e-3
    cosine_weight: float = 0.1  # weight of (1 - cosine) beside the MSE
    weight_decay: float = 0.01
    warmup: float = 0.0  # share of the steps in which the learning rate rises linearly
    decay_lr: bool = False  # cosine schedule to zero instead of a constant learning rate
    # train on x - mean x, where the factors need not carry the mean: same students, better
    # conditioned
    center: bool = False

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / (self.warmup * self.steps)) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay_lr else 1.0
        return self.lr * rise * fall


def distillation_loss(p: Tensor, y: Tensor, cosine_weight: float) -> tuple[Tensor, Tensor]:
    """Loss (k,) of predictions p (k, n, d) for targets y, and its gradient by p (k, n, d).

    loss = mean (p - y)^2 + w mean (1 - cos(p, y)), where 1 - cos = |e|^2 / 2 with e = p/|p| - y/|y|
    does not cancel near 0, and d(1 - cos)/dp = (e - (1 - cos) p/|p|) / |p|. The norms are kept
    above 1e-8, as torch.nn.functional.cosine_similarity does.
    """
    n, d = p.shape[-2:]
    length = p.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    unit = p / length
    apart = unit - y / y.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    distance = apart.square().sum(-1, keepdim=True) / 2
    error = p - y
    loss = error.square().mean((-2, -1)) + cosine_weight * distance.mean((-2, -1))
    angular = apart.addcmul_(unit, distance, value=-1).div_(length)
    return loss, error.mul_(2 / (n * d)).add_(angular, alpha=cosine_weight / n)


def distill(
    x: Tensor,
    outputs: Tensor,
    start: tuple[Tensor, Tensor, Tensor],
    recipe: Recipe,
    batches: list[torch.Generator],
    on_step: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train k students of one shape together, each on its own batches.

    x (n, d_in), the teachers' outputs (k, n, d_out), A (k, r, d_in), B (k, d_out, r) and bias
    (k, d_out) to start from -> the three trained, and the loss of every step (k, steps) before its
    update: column 0 is the warm start's. The gradients are written out because they are four
    lines; a test holds them against autograd.
    """
    mean = x.mean(0) if recipe.center else torch.zeros_like(x[0])
    A, B, b = (part.clone() for part in start)
    b = (b + (B @ (A @ mean)[..., None])[..., 0])[:, None]
    for parameter in (A, B, b):
        parameter.grad = torch.zeros_like(parameter)
    decay = recipe.weight_decay
    optimizer = torch.optim.AdamW([A, B, b], lr=recipe.lr, weight_decay=decay, fused=True)
    losses = x.new_empty(len(A), recipe.steps)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.lr_at(step)
        rows = [torch.randint(len(x), (recipe.batch,), generator=g).to(x.device) for g in batches]
        inputs = torch.stack([x[i] for i in rows]) - mean
        targets = torch.stack([y[i] for y, i in zip(outputs, rows)])
        hidden = torch.bmm(inputs, A.mT)
        predicted = torch.baddbmm(b, hidden, B.mT)
        losses[:, step], gradient = distillation_loss(predicted, targets, recipe.cosine_weight)
        torch.bmm(gradient.mT, hidden, out=B.grad)
        torch.bmm(torch.bmm(gradient, B).mT, inputs, out=A.grad)
        torch.sum(gradient, 1, keepdim=True, out=b.grad)
        optimizer.step()
        on_step()
    return A, B, b[:, 0] - (B @ (A @ mean)[..., None])[..., 0], losses


def pilot(
    x: Tensor,
    outputs: Tensor,
    start: tuple[Tensor, Tensor, Tensor],
    recipe: Recipe,
    source: Callable[[], torch.Generator],
    on_step: Callable[[], object] = lambda: None,
) -> tuple[Recipe, Record]:
    """The recipe with the learning rate of RATES whose pilot ends at the lowest training loss.

    A pilot trains the first student for half the steps, its schedule included; `source` gives all
    the same batches. The loss is the mean over the last tenth. Also what each rate reached.
    """
    first, steps = tuple(part[:1] for part in start), max(1, recipe.steps // 2)
    losses = {}
    for rate in RATES:
        short = replace(recipe, lr=rate, steps=steps)
        *_, loss = distill(x, outputs[:1], first, short, [source()], on_step)  # type: ignore[arg-type]
        losses[rate] = float(loss[0, -max(1, steps // 10) :].mean())
    chosen = min(losses, key=lambda rate: losses[rate])
    found = {
        "learning_rate": chosen,
        "steps": steps,
        "loss": {f"{k:g}": v for k, v in losses.items()},
    }
    return replace(recipe, lr=chosen), found


def pilot_steps(steps: int) -> int:
    """Steps of all pilots together."""
    return len(RATES) * max(1, steps // 2)


def shrunk(
    teachers: list[nn.Linear], folds: list[Moments], rank: int
) -> tuple[list[nn.Module], float]:
    """Closed forms for rows blended with inputs equally likely in all directions.

    The blend's weight is cross-validated over the folds for the first teacher; also that weight.
    """
    students: list[nn.Module] = []
    total = merged(folds)
    _, blend = blended_moments(teachers[0].weight, "input", folds, None, rank)
    for teacher in teachers:
        own = weights_own(teacher.weight.detach().to(total.mean), "input", total)
        solution = optimum(teacher.weight, teacher.bias, blended(total, own, blend), rank)
        students.append(solution.student(rank, torch.float32))
    return students, blend.weight
