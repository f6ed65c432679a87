"""One forward pass instead of the whole chain: from the large model's layers to the embedding.

With h the large model's chosen hidden layers side by side (k_h,) and z the nested embedding (k,):

    z ~ mean_z + B A (h - mean_h)       W: ridge of z on h, penalty by generalized cross-validation
                                        B = U, A = U^T W, U: leading eigenvectors of Cov(W h)

that is, reduced-rank regression from joint moments. The small models' blocks are predicted, no
longer copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.lowrank import Joint, fractions
from distil_rank.core.moments import Moments
from distil_rank.core.records import Record, save_tensors
from distil_rank.nested.chain import NestedChain, read_file
from distil_rank.nested.stage import regress

SCHEMA = "distil-rank/single-pass/1"
FILE = "single_pass.safetensors"
TOLERANCE = 1e-3  # share of the predicted variance that the low rank may lose


def default_layers(layers: int) -> tuple[int, ...]:
    """Four depths of a model of `layers` layers, evenly spaced, the last included."""
    return tuple(sorted({max(1, round(layers * i / 4)) for i in (1, 2, 3, 4)}))


def hidden_names(size: str, layers: Sequence[int]) -> list[str]:
    """Names of the hidden layers of a size among raw embeddings."""
    return [f"{size}@{layer}" for layer in layers]


@dataclass(frozen=True)
class SinglePass:
    """z = B A h + bias, float64: A (r, k_h), B (k, r), bias (k,)."""

    A: Tensor
    B: Tensor
    bias: Tensor
    layers: tuple[int, ...]  # of the large model, in the order of h
    record: Record = field(default_factory=dict)  # penalty, rank, R^2 per block: JSON values

    @classmethod
    def fit(
        cls,
        chain: NestedChain,
        moments: Moments,
        layers: Sequence[int],
        rank: int | None = None,
        held_out: Moments | None = None,
    ) -> SinglePass:
        """Fit from the moments of [raw embeddings of all sizes, hidden layers of the largest].

        `rank` by default is the smallest that keeps all but 0.1 % of the predicted variance.
        """
        hidden = moments.dim - sum(chain.widths.values())
        if hidden <= 0 or hidden % len(layers):
            got = f"{hidden} features beyond the sizes"
            raise InputError(f"moments with {len(layers)} hidden layers required, got {got}")
        joint = _hidden_and_nested(chain, moments)
        weight, fit = regress(joint, hidden, "ridge")
        best = Joint.of(joint, hidden).optimum(weight, ridge=math.inf)
        if rank is None:
            rank = 1 + int((fractions(best.tails)[1:] > TOLERANCE).sum())
        limit = min(weight.shape)
        if not 1 <= rank <= limit:
            raise InputError(f"a rank between 1 and {limit} required, got {rank}")
        record: Record = {"penalty": fit.penalty, "rank": rank, "rows": moments.count}
        single = cls(*best.factors(rank), tuple(layers), record)
        record["r2"] = {"fit": single.scores(chain, moments)}
        if held_out is not None and held_out.count >= 2:
            record["r2"]["held_out"] = single.scores(chain, held_out)
        return single

    def scores(self, chain: NestedChain, moments: Moments) -> dict[str, float]:
        """R^2 of every block of the nested embedding, by the size that adds it."""
        joint = _hidden_and_nested(chain, moments)
        hidden = self.A.shape[1]
        error_map = torch.cat([-self.B @ self.A, torch.eye(len(self.B), dtype=torch.float64)], 1)
        bias = error_map @ joint.mean - self.bias
        error = ((error_map @ joint.covariance) * error_map).sum(1) + bias.square()
        variance = joint.covariance.diagonal()[hidden:]
        scores, start = {}, 0
        for size, stop in chain.dims.items():
            scores[size] = 1 - float(error[start:stop].sum() / variance[start:stop].sum())
            start = stop
        return scores

    def embed(self, hidden: Sequence[Tensor]) -> Tensor:
        """Nested embedding (..., k) from the hidden states (..., d) of `layers`, in their dtype."""
        if len(hidden) != len(self.layers):
            raise InputError(f"hidden states of layers {self.layers} required, got {len(hidden)}")
        h = torch.cat([x.double() for x in hidden], -1)
        if h.shape[-1] != self.A.shape[1]:
            got = f"{h.shape[-1]}: another model?"
            raise InputError(f"{self.A.shape[1]} hidden features required, got {got}")
        A, B, bias = (t.to(h.device) for t in (self.A, self.B, self.bias))
        return (h @ A.T @ B.T + bias).to(hidden[0].dtype)

    def save(self, folder: str | Path) -> None:
        """Write `single_pass.safetensors` into a chain's folder."""
        header = {"schema": SCHEMA, "layers": self.layers, "record": self.record}
        tensors = {"A": self.A, "B": self.B, "bias": self.bias}
        save_tensors(Path(folder) / FILE, tensors, SCHEMA, header=header)

    @classmethod
    def load(cls, folder: str | Path) -> SinglePass:
        """Read what `save` wrote."""
        remedy = "run nested fit --single-pass"
        tensors, header = read_file(Path(folder) / FILE, SCHEMA, "header", "map", remedy)
        return cls(**tensors, layers=tuple(header["layers"]), record=header["record"])


def _hidden_and_nested(chain: NestedChain, moments: Moments) -> Moments:
    """Moments of [hidden layers, nested embedding] from those of [raw sizes, hidden layers]."""
    matrix, shift = chain.affine()
    hidden = moments.dim - matrix.shape[1]
    swapped = torch.block_diag(matrix, torch.eye(hidden, dtype=torch.float64)).roll(hidden, 0)
    return moments.mapped(swapped, torch.cat([shift.new_zeros(hidden), shift]))
