"""The low-rank layer itself, and plain linear layers from tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distil_rank.core.records import load_tensors, save_tensors

SCHEMA = "distil-rank/student/1"


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

    >>> layer = LowRankLinear(torch.ones(2, 5), torch.ones(3, 2), torch.zeros(3))
    >>> layer.rank, layer(torch.ones(1, 5)).tolist()
    (2, [[10.0, 10.0, 10.0]])
    """

    def __init__(self, A: Tensor, B: Tensor, bias: Tensor | None = None):
        super().__init__()
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            got = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ValueError(f"A (r, d_in) and B (d_out, r) required, got {got}")
        rank, d_in = A.shape
        self.A = nn.Linear(d_in, rank, bias=False, device="meta")
        self.B = nn.Linear(rank, len(B), bias=bias is not None, device="meta")
        self.A.weight = nn.Parameter(A.detach().clone(memory_format=torch.contiguous_format))
        self.B.weight = nn.Parameter(B.detach().clone(memory_format=torch.contiguous_format))
        if bias is not None:
            self.B.bias = nn.Parameter(bias.detach().clone())

    @property
    def rank(self) -> int:
        return self.A.out_features

    @property
    def in_features(self) -> int:
        return self.A.in_features

    @property
    def out_features(self) -> int:
        return self.B.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))

    def truncate(self, rank: int) -> LowRankLinear:
        """The student of the first `rank` factors: they are ordered, so it is the rank-`rank` one.

        The bias stays as it is; `Optimum.student` also refits it.
        """
        check_rank(rank, self.rank)
        return LowRankLinear(
            self.A.weight[:rank].detach(), self.B.weight[:, :rank].detach(), self.B.bias
        )

    def save(self, path: str | Path, certificate: Certificate | None = None) -> None:
        """Write the factors as safetensors, the certificate as JSON in the header."""
        known = certificate and asdict(certificate)
        save_tensors(path, self.state_dict(), SCHEMA, certificate=known)

    @staticmethod
    def load(path: str | Path) -> tuple[LowRankLinear, Certificate | None]:
        """Read a student written by `save`, with its certificate."""
        tensors, header = load_tensors(path, SCHEMA, "low-rank factors")
        fields = header["certificate"]
        student = LowRankLinear(tensors["A.weight"], tensors["B.weight"], tensors.get("B.bias"))
        return student, Certificate(**fields) if fields else None


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
