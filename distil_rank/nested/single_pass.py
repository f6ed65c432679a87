"""One forward pass instead of the whole chain: a map from the large model's hidden layers to the nested embedding.

With h the large model's chosen hidden layers side by side (k_h,) and z the nested embedding (k,):

    z ~ mean_z + B A (h - mean_h)       W: ridge of z on h, penalty by generalised cross-validation
                                        B = U, A = U^T W, U: leading eigenvectors of Cov(W h)

that is, reduced-rank regression from joint moments. The small models' blocks are predicted, no longer copied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.regression import regress
from distil_rank.core.moments import Moments, symmetric_product

SCHEMA = "distil-rank/single-pass/1"
FILE = "single_pass.safetensors"
TOLERANCE = 1e-3  # share of the predicted variance that the low rank may lose


def default_layers(layers: int) -> tuple[int, ...]:
    """Four depths of a model of `layers` layers, evenly spaced, the last included."""
    return tuple(sorted({max(1, round(layers * i / 4)) for i in (1, 2, 3, 4)}))


@dataclass(frozen=True)
class SinglePass:
    """z = B A h + bias, float64: A (r, k_h), B (k, r), bias (k,); `layers` of the large model, in the order of h."""

    A: Tensor
    B: Tensor
    bias: Tensor
    layers: tuple[int, ...]
    record: dict[str, Any] = field(default_factory=dict)  # penalty, rank, R^2 per block: JSON values

    @classmethod
    def fit(
        cls,
        chain: NestedChain,
        moments: Moments,
        layers: Sequence[int],
        rank: int | None = None,
        held_out: Moments | None = None,
    ) -> SinglePass:
        """Fit from the moments of [raw embeddings of all sizes, hidden layers of the largest], side by side.

        `rank` by default is the smallest that keeps all but 0.1 % of the predicted variance.
        """
        widths = sum(chain.widths.values())
        hidden = moments.dim - widths
        if hidden <= 0 or hidden % len(layers):
            raise InputError(
                f"moments with {len(layers)} hidden layers required, got {hidden} features beyond the sizes"
            )
        joint = _hidden_and_nested(chain, moments)
        weight, fit = regress(joint, hidden, "ridge")
        covariance = symmetric_product(weight @ joint.covariance[:hidden, :hidden], weight.T)
        eigenvalues, U = (t.flip(-1) for t in torch.linalg.eigh(covariance))
        if rank is None:
            tail = 1 - eigenvalues.clamp_min(0).cumsum(0) / eigenvalues.clamp_min(0).sum()
            rank = 1 + int((tail > TOLERANCE).sum())
        limit = min(weight.shape)
        if not 1 <= rank <= limit:
            raise InputError(f"a rank between 1 and {limit} required, got {rank}")
        B = U[:, :rank].contiguous()
        A = B.T @ weight
        bias = joint.mean[hidden:] - B @ (A @ joint.mean[:hidden])
        record: dict[str, Any] = {"penalty": fit.penalty, "rank": rank, "rows": moments.count}
        single = cls(A, B, bias, tuple(layers), record)
        record["r2"] = {"fit": single.scores(chain, moments)}
        if held_out is not None and held_out.count >= 2:
            record["r2"]["held_out"] = single.scores(chain, held_out)
        return single

    def scores(self, chain: NestedChain, moments: Moments) -> dict[str, float]:
        """R^2 of every block of the nested embedding, by the size that adds it, on the rows behind the moments."""
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
            raise InputError(f"{self.A.shape[1]} hidden features required, got {h.shape[-1]}: another model?")
        A, B, bias = (t.to(h.device) for t in (self.A, self.B, self.bias))
        return (h @ A.T @ B.T + bias).to(hidden[0].dtype)

    def save(self, folder: str | Path) -> None:
        """Write `single_pass.safetensors` into a chain's folder, whole or not at all."""
        path = Path(folder) / FILE
        temporary = path.with_name(f"{FILE}.tmp{os.getpid()}")
        header = {"schema": SCHEMA, "layers": self.layers, "record": self.record}
        try:
            tensors = {"A": self.A.contiguous(), "B": self.B, "bias": self.bias}
            save_file(tensors, temporary, metadata={"header": json.dumps(header, allow_nan=False)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> SinglePass:
        """Read what `save` wrote."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, framework="pt") as file:
                header: Mapping[str, Any] = json.loads((file.metadata() or {}).get("header", "{}"))
                if header.get("schema") != SCHEMA:
                    raise InputError(
                        f"a map of schema {SCHEMA} required, got {header.get('schema')} in {path}; fit it again"
                    )
                A, B, bias = (file.get_tensor(key) for key in ("A", "B", "bias"))
                return cls(A, B, bias, tuple(header["layers"]), dict(header["record"]))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"a single-pass map required, got {path} ({error}); run nested fit --single-pass"
            ) from None


def _hidden_and_nested(chain: NestedChain, moments: Moments) -> Moments:
    """Moments of [hidden layers, nested embedding] from those of [raw sizes, hidden layers]."""
    matrix, shift = chain.affine()
    widths, scatter = matrix.shape[1], moments.scatter
    across = matrix @ scatter[:widths, widths:]
    among = symmetric_product(matrix @ scatter[:widths, :widths], matrix.T)
    joint = torch.cat([torch.cat([scatter[widths:, widths:], across.T], 1), torch.cat([across, among], 1)])
    mean = torch.cat([moments.mean[widths:], matrix @ moments.mean[:widths] + shift])
    return Moments.from_state(
        {"count": torch.tensor(moments.count, dtype=torch.float64), "mean": mean, "scatter": joint}
    )
