"""The layers that compression makes, and plain linear layers from tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Certificate:
    """What a student lost, and what any student of its rank must lose.

    FVU is the MSE over the variance of the teacher's output.
    """

    rank: int
    rows: float  # rows the moments were taken from
    achieved_fvu: float  # of the student as deployed (cast factors), on those rows
    floor_fvu: float  # of the best rank-r student on those rows
    held_out_rows: float | None = None
    held_out_achieved_fvu: float | None = None
    held_out_floor_fvu: float | None = None  # no rank-r student is below this on the held-out rows

    @property
    def gap(self) -> float:
        """Achieved minus floor on the fitted rows, in FVU."""
        return self.achieved_fvu - self.floor_fvu


class LowRankLinear(nn.Module):
    """y = B (A x) + bias with A (r, d_in) and B (d_out, r): two plain linear layers.

    inner_mean (r,), where given, is A mu with the mean mu of the inputs: `truncate` refits the bias
    with it.

    >>> layer = LowRankLinear(torch.ones(2, 5), torch.ones(3, 2), torch.zeros(3))
    >>> layer.rank, layer(torch.ones(1, 5)).tolist()
    (2, [[10.0, 10.0, 10.0]])
    """

    inner_mean: Tensor | None

    def __init__(
        self, A: Tensor, B: Tensor, bias: Tensor | None = None, inner_mean: Tensor | None = None
    ):
        super().__init__()
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            got = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ValueError(f"A (r, d_in) and B (d_out, r) required, got {got}")
        rank, d_in = A.shape
        self.A = nn.Linear(d_in, rank, bias=False, device="meta")
        self.B = nn.Linear(rank, len(B), bias=bias is not None, device="meta")
        self.A.weight, self.B.weight = _copied(A), _copied(B)
        if bias is not None:
            self.B.bias = _copied(bias)
        self.register_buffer("inner_mean", None if inner_mean is None else inner_mean.clone())

    @property
    def rank(self) -> int:
        return self.A.out_features

    @property
    def in_features(self) -> int:
        return self.A.in_features

    @property
    def out_features(self) -> int:
        return self.B.out_features

    @property
    def weight(self) -> Tensor:
        """The product B A (d_out, d_in), computed on demand, for modules that read a weight."""
        return self.B.weight @ self.A.weight

    @property
    def bias(self) -> Tensor | None:
        return self.B.bias

    @property
    def dtype(self) -> torch.dtype:
        return self.A.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.A.weight.device

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name, for calls by keyword
        return self.B(self.A(input))

    def truncate(self, rank: int) -> LowRankLinear:
        """The student that `compress_linear` makes at a smaller rank: factors are ordered.

        Exact for a student as it was fitted; training ends the order. ValueError for one that does
        not know the mean of its inner features, which the bias needs.
        """
        check_rank(rank, self.rank)
        if self.inner_mean is None:
            raise ValueError(
                "a student made by compress_linear required, which refits its bias when truncated,"
                " got one without the mean of its inner features; use Optimum.student(rank)"
            )
        A, B = self.A.weight.detach(), self.B.weight.detach()
        bias = B[:, rank:] @ self.inner_mean[rank:]
        bias = bias if self.B.bias is None else self.B.bias.detach() + bias
        return LowRankLinear(A[:rank], B[:, :rank], bias, self.inner_mean[:rank])

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *rest: Any, **more: Any
    ) -> None:
        """As a plain module, and with an inner mean where the state dict has one."""
        found = state_dict.get(f"{prefix}inner_mean")
        if (found is None) != (self.inner_mean is None):
            self.inner_mean = None if found is None else torch.empty_like(found)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


class PrunedLinear(nn.Linear):
    """A dense layer with fewer inputs or outputs than the one whose place it takes."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight.shape[1], len(weight), bias is not None, device="meta")
        self.weight = _copied(weight)
        if bias is not None:
            self.bias = _copied(bias)


def _copied(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear from weight (d_out, d_in) and bias (d_out,); draws no random numbers."""
    d_out, d_in = weight.shape
    layer = nn.Linear(d_in, d_out, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def check_rank(rank: int, limit: int) -> None:
    if not 1 <= rank <= limit:
        raise ValueError(f"rank must be between 1 and min(d_out, d_in)={limit}, got rank={rank}")
