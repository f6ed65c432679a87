"""Distilling a causal language model: the objective with its gradient, and the published variant.

Teacher logits z_T, student z_S; position t predicts token t + 1, so l tokens give l - 1
predictions. With temperature tau, p = softmax(z_T / tau) and q = softmax(z_S / tau):

    soft_t = sum_v p_v (log p_v - log q_v)                       Hinton, Vinyals and Dean (2015)
    L = alpha mean_t CE(z_S, token) + (1 - alpha) tau^2 mean_t w_t soft_t    over real predictions

uncertainty   w_t = 0.5 + 0.5 (H_t - min) / (max - min), H_t the entropy of softmax(z_T), extremes
              over the residues of a sequence; line breaks and ends lie below and have 0.5
calibration   p <- (1 - eps_t) p + eps_t / V with eps_t = smoothing (1 - max_v p_v)

Value and gradient are computed together, a few rows of logits at a time. Logits are states @
weight.T: with a large vocabulary states and weight come in (`Hidden`) and their gradients go out,
so nothing of (rows, V) exists for student, teacher or gradient. Functions return sums
with their count, not means: whoever accumulates divides once, by the count of the whole batch, and
the split into micro-batches changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distil_rank.core.errors import InputError, above, at_least, at_most

CHUNK = 1 << 20  # logits worked on at a time: 4 MB in float32, within the processor's cache
WIDE_CHUNK = 1 << 21  # where logits are made from states: a product wants more rows


@dataclass(frozen=True)
class Objective:
    """What the student is asked to imitate."""

    temperature: float = 2.0  # tau: softens both distributions
    alpha: float = 0.5  # share of the cross-entropy to the tokens; the rest: of the divergence
    uncertainty: bool = False  # weight positions by the teacher's entropy
    calibration: bool = False  # smooth the teacher where it is unsure
    smoothing: float = 0.1  # lambda of the calibration smoothing

    def check(self) -> None:
        """Raise InputError on values outside their range."""
        above(0, tau=self.temperature)
        at_least(0, alpha=self.alpha, smoothing=self.smoothing)
        at_most(1, alpha=self.alpha, smoothing=self.smoothing)


class Hidden(NamedTuple):
    """Logits that are made when needed: states @ weight.T, or the states where weight is None."""

    states: Tensor  # (..., d)
    weight: Tensor | None = None  # (V, d)

    @property
    def vocabulary(self) -> int:
        return self.states.shape[-1] if self.weight is None else len(self.weight)

    @property
    def step(self) -> int:
        """Rows worked on together."""
        return max(1, (CHUNK if self.weight is None else WIDE_CHUNK) // self.vocabulary)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits (n, V) of some rows of flattened states (m, d)."""
        chosen = self.states[rows]
        return chosen if self.weight is None else chosen @ self.weight.to(chosen.dtype).T


class LossSums(NamedTuple):
    """Sums over the real predictions of a batch; only `loss` carries the gradient."""

    loss: Tensor
    hard: Tensor  # cross-entropy to the tokens
    soft: Tensor  # divergence from the teacher, weighted, without tau^2
    n: int  # predictions


def predictions(mask: Tensor) -> Tensor:
    """Which predictions count (b, l - 1): the token read and the token predicted are real."""
    mask = mask.bool()
    return mask[:, :-1] & mask[:, 1:]


def distillation_sums(
    student: Tensor | Hidden,
    teacher: Tensor | Hidden | None,
    tokens: Tensor,
    mask: Tensor,
    objective: Objective,
    layout: Sequence[int] = (),
) -> LossSums:
    """Sums over a batch: logits (b, l, V), tokens and mask (b, l); no teacher: cross-entropy.

    Padding may stand left or right and be any token, also the end token: only `mask` says what is
    real. `layout`: tokens without residues, which set no extreme of the weights.
    """
    student = student if isinstance(student, Hidden) else Hidden(student)
    counted = predictions(mask)
    rows = F.pad(counted, (0, 1)).flatten().nonzero()[:, 0]  # of the flattened (b l, V) logits
    targets = tokens.flatten()[rows + 1]
    flat: Hidden | None = None
    weights = torch.ones(len(rows), device=rows.device)
    if teacher is None:
        objective = Objective(alpha=1.0)
    else:
        given = teacher if isinstance(teacher, Hidden) else Hidden(teacher)
        if given.vocabulary != student.vocabulary:
            sizes = f"{student.vocabulary} and {given.vocabulary}"
            raise InputError(f"one vocabulary required, got {sizes} logits")
        flat = Hidden(given.states.flatten(0, 1), given.weight)
    if flat is not None and objective.uncertainty:
        by_row = entropy(flat, rows)
        by_position = by_row.new_zeros(counted.shape)
        by_position[counted] = by_row
        residues = counted & ~torch.isin(tokens[:, 1:], tokens.new_tensor(layout))
        weights = position_weights(by_position, counted, residues)[counted]
    loss, hard, soft = _Distil.apply(*student, flat, rows, targets, weights, objective)  # type: ignore[no-untyped-call]
    return LossSums(loss, hard, soft, len(targets))


def entropy(logits: Tensor | Hidden, rows: Tensor | None = None) -> Tensor:
    """Entropy of softmax(logits) in nats, (n, V) -> (n,), or of the chosen rows only, in chunks."""
    source = logits if isinstance(logits, Hidden) else Hidden(logits.detach())
    dtype, found = _working_dtype(source.states), []
    rows = torch.arange(len(source.states)) if rows is None else rows
    for chosen in rows.split(source.step):
        log_p = torch.log_softmax(source.logits(chosen).to(dtype), dim=-1)
        found.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(found)


def position_weights(entropies: Tensor, counted: Tensor, residues: Tensor) -> Tensor:
    """w_t of the module's text per sequence (b, l), extremes over residues; 0 where not counted."""
    low = entropies.masked_fill(~residues, float("inf")).amin(-1, keepdim=True)
    high = entropies.masked_fill(~residues, float("-inf")).amax(-1, keepdim=True)
    span = high - low
    flat = ~(span >= 1e-8)  # also sequences without a residue, where the span is -inf
    low, span = low.masked_fill(flat, 0.0), span.masked_fill(flat, 1.0)
    scaled = torch.where(flat, torch.zeros_like(entropies), ((entropies - low) / span).clamp(0, 1))
    return torch.where(counted, 0.5 + 0.5 * scaled, torch.zeros_like(entropies))


class _Distil(torch.autograd.Function):
    """Loss sums over chosen rows of the flattened logits, and the gradients in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,  # (b, l, d), as the next of a Hidden
        weight: Tensor | None,  # (V, d)
        teacher: Hidden | None,  # (b l, ...)
        rows: Tensor,  # (n,) into b l
        targets: Tensor,  # (n,)
        weights: Tensor,  # (n,)
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tau, alpha, wanted = objective.temperature, objective.alpha, ctx.needs_input_grad[0]
        dtype = _working_dtype(states)
        student = Hidden(states.flatten(0, 1), None if weight is None else weight.to(states.dtype))
        hard_sum = torch.zeros((), dtype=torch.float64, device=states.device)
        soft_sum = hard_sum.clone()
        gradient = torch.zeros_like(student.states) if wanted else None
        by_weight = torch.zeros_like(weight) if wanted and weight is not None else None
        if teacher is not None and teacher.weight is not None:
            teacher = Hidden(teacher.states, teacher.weight.to(teacher.states.dtype))
        pieces = (rows, targets[:, None], weights.to(dtype)[:, None])
        for chosen, picked, w in zip(*(piece.split(student.step) for piece in pieces)):
            z = student.logits(chosen).to(dtype)
            log_q1 = torch.log_softmax(z, dim=-1)
            hard_sum -= log_q1.gather(1, picked).sum(dtype=torch.float64)
            slope = log_q1.exp() if wanted else log_q1
            slope.scatter_add_(1, picked, slope.new_full(picked.shape, -1.0)).mul_(alpha)
            if teacher is not None and alpha < 1:
                log_q = torch.log_softmax(z.div_(tau), dim=-1)
                p, log_p = _teacher_rows(teacher, chosen, dtype, objective)
                soft_sum += log_p.sub_(log_q).mul_(p).mul_(w).sum(dtype=torch.float64)
                slope.add_(log_q.exp_().sub_(p).mul_((1 - alpha) * tau * w))
            if gradient is not None:
                slope = slope.to(gradient.dtype)
                gradient[chosen] = slope if student.weight is None else slope @ student.weight
                if by_weight is not None:
                    own = student.states[chosen].to(by_weight.dtype)
                    by_weight.addmm_(slope.to(by_weight.dtype).T, own)
        loss = alpha * hard_sum + (1 - alpha) * tau**2 * soft_sum
        ctx.gradients = (None if gradient is None else gradient.view(states.shape), by_weight)
        ctx.mark_non_differentiable(hard_sum, soft_sum)
        return loss, hard_sum, soft_sum

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: there is no second pass
        if gradients is None:
            raise RuntimeError(
                "the gradient of this loss was already taken; compute the loss again"
            )
        scaled = (None if g is None else g.mul_(outer[0].to(g.dtype)) for g in gradients)
        return *scaled, None, None, None, None, None


def _teacher_rows(
    teacher: Hidden, rows: Tensor, dtype: torch.dtype, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Teacher's p and log p (n, V) at temperature tau."""
    log_p = torch.log_softmax(teacher.logits(rows).to(dtype) / objective.temperature, dim=-1)
    p = log_p.exp()
    if not objective.calibration:
        return p, log_p
    eps = objective.smoothing * (1 - p.amax(-1, keepdim=True))
    p = (1 - eps) * p + eps / p.shape[-1]
    return p, p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
