"""The best student of a function with one narrow layer: a linear part and a few bent units.

    y = B a + b,  a = A x + c,  GELU on all features of a but the first ones

costs as much as one linear map of rank `width`. It starts from the closed form
(`core.functions.distill_function`), whose weakest directions give way to the bent units, and is
distilled on what the function's output is used for. Inputs are whitened while it trains. Labels
are free, so drawn rows are fitted too. How many units are bent, and when to stop, is decided on
rows kept aside; where no bent unit helps on these, the closed form itself is returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.functions import DRAWN, Function, distill_function, drawn_rows, fvu, outputs
from distil_rank.core.linear import LowRankLinear, linear
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator

BENT = (16, 8, 4)  # one in so many features is bent
ASIDE, FEWEST = 10, 50  # one in so many rows is kept aside; so many, where there are thrice as many
NOISE = 0.3  # of drawn rows, in standard deviations
BATCH, RATE, WARMUP = 256, 3e-3, 50
CHECK = 100  # steps between looks at the rows kept aside
LEAST = 1e-5  # of the largest variance: what whitening takes for the smallest


class PartGELU(nn.Module):
    """GELU on all features but the first `linear`."""

    def __init__(self, linear: int = 0):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        kept, bent = x[..., : self.linear], x[..., self.linear :]
        return torch.cat([kept, nn.functional.gelu(bent)], -1)


@dataclass(frozen=True)
class NarrowCertificate:
    """Loss of a narrow student, in FVU of the function's output as it is used."""

    width: int
    bent: int  # features with an activation; 0: the closed form
    rows: int
    achieved_fvu: float
    linear_fvu: float  # of the closed form of the same width
    aside_fvu: dict[int, float]  # on rows kept aside, by the number of bent features


def distill_narrow(
    f: Function,
    x: Tensor,
    width: int,
    after: Function = nn.Identity(),  # noqa: B008 - has no state
    steps: int = 1500,
    seed: int = 0,
) -> tuple[nn.Sequential | LowRankLinear, NarrowCertificate]:
    """Student of f: (n, d_in) -> (n, d_out) with `width` inner features, from rows x (n, d_in).

    after: what the output is used for, such as its scaling to unit length; losses are of
    after(f(x)).
    """
    if width < 1 or steps < 1:
        raise InputError(f"a width and steps of at least 1 required, got {width} and {steps}")
    y = outputs(f, x)
    limit = min(width, x.shape[1], y.shape[1])
    start = distill_function(f, x, limit, seed=seed)[0]
    best: nn.Sequential | LowRankLinear = start
    order = torch.randperm(len(x), generator=generator(seed, "rows aside")).to(x.device)
    aside = max(len(x) // ASIDE, min(len(x) // 3, FEWEST))
    bent, losses = 0, dict[int, float]()
    bents = sorted({max(width // part, width - limit, 1) for part in BENT} - {width})
    if aside >= 2 and bents:
        task = _Task(f, after, x[order[aside:]], x[order[:aside]], limit, seed)
        losses = {b: task.train(width, b, max(1, steps // 5))[1] for b in bents}
        chosen = min(losses, key=lambda b: losses[b])
        found, losses[chosen] = task.train(width, chosen, steps)
        losses[0] = task.lost(task.start)
        if losses[chosen] < losses[0]:
            best, bent = found, chosen
    with torch.no_grad():
        achieved, straight = (fvu(after(student(x)), after(y)) for student in (best, start))
    return best.eval(), NarrowCertificate(width, bent, len(x), achieved, straight, losses)


class _Task:
    """Rows to fit, whitened, and rows to judge by, with what the function makes of them."""

    def __init__(
        self, f: Function, after: Function, own: Tensor, aside: Tensor, rank: int, seed: int
    ):
        self.after, self.aside, self.seed = after, aside, seed
        self.start = distill_function(f, own, rank, seed=seed)[0]  # knows nothing of `aside`
        rows = torch.cat([own, drawn_rows(own, NOISE, max(len(own), DRAWN), seed)])
        moments = Moments.of(rows)
        values, basis = torch.linalg.eigh(moments.covariance)
        root = values.clamp_min(LEAST * float(values[-1])).sqrt()
        self.mean, self.map, self.back = moments.mean, basis / root, (basis * root).T
        self.x = ((rows.double() - self.mean) @ self.map).to(rows)
        y = outputs(f, rows)
        self.center, self.scale = y.mean(0), y.std().clamp_min(1e-30)
        with torch.no_grad():
            self.y, self.target = after(y), after(outputs(f, aside))

    def lost(self, student: nn.Module) -> float:
        """FVU on the rows kept aside."""
        with torch.no_grad():
            return fvu(self.after(student(self.aside)), self.target)

    def train(self, width: int, bent: int, steps: int) -> tuple[nn.Sequential, float]:
        """Adam on the squared error of the output; the best student met, and its FVU aside."""
        kept, source = width - bent, generator(self.seed, "narrow", bent)
        inner = (self.start.A.weight.detach().double()[:kept] @ self.back.T).to(self.x)
        length, d = inner.norm(dim=1).clamp_min(1e-30), inner.shape[1]
        drawn = torch.randn(bent, d + 1, generator=source).to(self.x)
        A = torch.cat([inner / length[:, None], drawn[:, :d] / d**0.5])
        c = torch.cat([drawn.new_zeros(kept), drawn[:, d]])
        B = self.start.B.weight.detach()[:, :kept] * length / self.scale
        B = torch.cat([B, B.new_zeros(len(B), bent)], 1)
        parameters = [p.clone().requires_grad_() for p in (A, c, B, B.new_zeros(len(B)))]
        part, unit = PartGELU(kept), self.y.var(0, correction=0).sum().clamp_min(1e-30)
        optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
        best, least = self._student(parameters, part), math.inf
        for step in range(1, steps + 1):
            fall = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            optimizer.param_groups[0]["lr"] = RATE * fall * min(1.0, step / WARMUP)
            rows = torch.randint(len(self.x), (BATCH,), generator=source).to(self.x.device)
            with torch.enable_grad():
                A, c, B, b = parameters
                y = (part(self.x[rows] @ A.T + c) @ B.T + b) * self.scale + self.center
                loss = (self.after(y) - self.y[rows]).square().sum(1).mean() / unit
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            if step % CHECK == 0 or step == steps:
                student = self._student(parameters, part)
                if (reached := self.lost(student)) < least:
                    best, least = student, reached
        return best, least

    def _student(self, parameters: list[Tensor], part: PartGELU) -> nn.Sequential:
        """For plain inputs and outputs."""
        A, c, B, b = (p.detach().double() for p in parameters)
        A = A @ self.map.T
        layers = (A, c - A @ self.mean), (B * self.scale, b * self.scale + self.center)
        first, second = (linear(*(t.to(self.x) for t in layer)) for layer in layers)
        return nn.Sequential(first, part, second)
