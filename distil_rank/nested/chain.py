"""A nested embedding of a whole model family: every prefix is the nested embedding of the smaller models.

    chain = NestedChain.fit({"8M": h8, "35M": h35, "650M": h650}, regression="pcr")
    z = chain.embed({"8M": h8, "35M": h35, "650M": h650})    # (..., 1280); z[..., :320] is h8, bit for bit
    z = chain.embed({"8M": h8, "35M": h35}, dim=480)         # the same columns, without running the 650M model
    chain.reconstruct(z, "650M")                             # raw_650M from the nested embedding

Each stage is fitted on nested_r, which is what it is applied to, never on raw_r. All stages come from one streaming pass
over the moments of all sizes side by side: nested_r is affine in the raw embeddings, so the joint moments of [nested_r,
raw_p] are an affine image of those. The map is affine, so the nested embedding of a mean is the mean of the nested ones.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.nested.regression import Fit, check_regression
from distil_rank.nested.rows import Rows, as_rows, check_order, joint_moments
from distil_rank.nested.stage import Stage, fit_stage
from distil_rank.core.randomness import generator
from distil_rank.core.records import write_json
from distil_rank.core.moments import Moments, symmetric_product

SCHEMA = "distil-rank/nested-chain/1"
FILE = "chain.safetensors"
TENSORS = ("mean_prefix", "mean_large", "weight", "scale", "directions", "eigenvalues")


@dataclass(frozen=True)
class NestedChain:
    """Names and raw widths of the sizes, smallest first, and the stage that leads from each to the next."""

    widths: dict[str, int]
    stages: tuple[Stage, ...]
    record: dict[str, Any] = field(default_factory=dict)  # options, R^2 per stage, provenance: JSON values

    @classmethod
    def fit(
        cls,
        stores: Mapping[str, Rows | Tensor],
        regression: str = "pcr",
        components: str | int = "mp",
        scale_features: bool = False,
        directions: Mapping[str, int] | None = None,
        held_out: float = 0.1,
    ) -> NestedChain:
        """Fit a chain on row-wise aligned embeddings by size, smallest first: tensors (n, k) or stores of residue rows.

        `directions` gives the number of new directions of a size where it should not be k_p - k_r. A fraction
        `held_out` of the proteins (by sequence) is left for R^2 and for `components="held-out"`.
        """
        check_regression(regression, components)
        rows = as_rows(stores)
        check_order({name: r.dim for name, r in rows.items()})
        fitted, other = joint_moments(rows, held_out)
        widths = {name: r.dim for name, r in rows.items()}
        return cls.fit_moments(fitted, widths, regression, components, scale_features, directions, other)

    @classmethod
    def fit_moments(
        cls,
        moments: Moments,
        widths: Mapping[str, int],
        regression: str = "pcr",
        components: str | int = "mp",
        scale_features: bool = False,
        directions: Mapping[str, int] | None = None,
        held_out: Moments | None = None,
        random_seed: int | None = None,
    ) -> NestedChain:
        """Fit a chain from the moments of all sizes side by side, in the order of `widths`.

        With `random_seed`, the new directions are a random orthonormal completion (a baseline).
        """
        check_regression(regression, components)
        check_order(widths)
        if moments.dim != sum(widths.values()):
            raise InputError(
                f"moments of {sum(widths.values())} features required, got {moments.dim}; gather them again"
            )
        if moments.count < 2:
            raise InputError(f"at least 2 rows to fit on required, got {moments.count:.0f}; give more proteins")
        names = list(widths)
        added = {b: widths[b] - widths[a] for a, b in itertools.pairwise(names)}
        if unknown := set(directions or {}) - set(added):
            raise InputError(f"directions of {', '.join(added)} may be given, got {', '.join(sorted(unknown))}")
        added |= directions or {}
        bad = {name: m for name, m in added.items() if not 1 <= m <= widths[name]}
        if bad:
            raise InputError(f"between 1 and the width of directions required, got {bad}")
        held_out = held_out if held_out is not None and held_out.count >= 2 else None
        columns = offsets(widths)
        # nested_r = nested @ (raw embeddings of the sizes up to r, side by side) + shift
        nested = torch.eye(widths[names[0]], dtype=torch.float64)
        shift = torch.zeros(widths[names[0]], dtype=torch.float64)
        stages, scores = [], []
        for smaller, name in itertools.pairwise(names):
            joint = joined_moments(moments, nested, shift, columns[name])
            joint_held_out = None if held_out is None else joined_moments(held_out, nested, shift, columns[name])
            random = None if random_seed is None else generator(random_seed, "completion", name)
            stage = fit_stage(
                joint,
                len(nested),
                added[name],
                regression,
                components,
                scale_features,
                joint_held_out,
                random,
                f"{smaller} -> {name}",
            )
            stages.append(stage)
            scores.append(
                {
                    "fit": stage.scores(joint),
                    "held_out": None if joint_held_out is None else stage.scores(joint_held_out),
                }
            )
            nested, shift = extended(nested, shift, stage)
        record = {
            "options": {"regression": regression, "components": components, "scale_features": scale_features},
            "rows": {"fit": moments.count, "held_out": 0.0 if held_out is None else held_out.count},
            "r2": dict(zip(names[1:], scores)),
        }
        return cls(dict(widths), tuple(stages), record)

    @property
    def sizes(self) -> list[str]:
        return list(self.widths)

    @property
    def dims(self) -> dict[str, int]:
        """Width of the nested embedding at each size: the Matryoshka dimensions."""
        dims = {self.sizes[0]: self.widths[self.sizes[0]]}
        for name, stage in zip(self.sizes[1:], self.stages):
            dims[name] = dims[self.sizes[len(dims) - 1]] + stage.added
        return dims

    def sizes_for(self, dim: int | None = None) -> list[str]:
        """The models that must run for an embedding of `dim`; InputError where the chain has no such embedding."""
        dims = self.dims
        low, high = dims[self.sizes[0]], dims[self.sizes[-1]]
        if dim is not None and not low <= dim <= high:
            listed = ", ".join(f"{d} ({name})" for name, d in dims.items())
            raise InputError(f"a dim between {low} and {high} required, best one of {listed}; got {dim}")
        return [name for i, name in enumerate(self.sizes) if i == 0 or dim is None or dims[self.sizes[i - 1]] < dim]

    def embed(self, raws: Mapping[str, Tensor], dim: int | None = None, normalize: bool = False) -> Tensor:
        """Nested embedding (..., dim) of raw embeddings (..., k) by size, in the dtype of the smallest, which is copied.

        `dim` cuts the embedding (default: the whole chain); models beyond it are not needed. `normalize` divides by the
        L2 norm after the cut.
        """
        needed = self.sizes_for(dim)
        for name in needed:
            self._check(name, raws)
        z = raws[needed[0]]
        for name, stage in zip(needed[1:], self.stages):
            x = raws[name]
            if x.shape[:-1] != z.shape[:-1] or x.device != z.device:
                raise InputError(
                    f"row-wise aligned embeddings required, got {tuple(x.shape)} of {name} for {tuple(z.shape)} so far"
                )
            count = stage.added if dim is None else min(stage.added, dim - z.shape[-1])
            block = stage.block(z, x, count).to(z.dtype)
            if not bool(block.isfinite().all()):
                raise InputError(
                    f"finite embeddings that {z.dtype} can hold required, got NaN or infinity at {name}; use float32"
                )
            z = torch.cat([z, block], -1)
        if dim is not None:
            z = z[..., :dim]
        return torch.nn.functional.normalize(z, dim=-1) if normalize else z

    def reconstruct(self, z: Tensor, size: str) -> Tensor:
        """Raw embedding of one size (..., k_p) from a nested one that reaches into it, in z's dtype."""
        if size not in self.widths:
            raise InputError(f"one of the sizes {', '.join(self.sizes)} required, got {size!r}")
        index = self.sizes.index(size)
        if index == 0:
            return z[..., : self.widths[size]]
        stage, prefix = self.stages[index - 1], self.dims[self.sizes[index - 1]]
        if z.shape[-1] < prefix:
            raise InputError(
                f"a nested embedding of at least {prefix} dims required to reconstruct {size}, got {z.shape[-1]}"
            )
        return stage.reconstruct(z[..., :prefix], z[..., prefix : prefix + stage.added]).to(z.dtype)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Matrix (dim, sum of widths) and shift (dim,): the nested embedding as a map of all sizes side by side."""
        first = self.widths[self.sizes[0]]
        nested, shift = torch.eye(first, dtype=torch.float64), torch.zeros(first, dtype=torch.float64)
        for stage in self.stages:
            nested, shift = extended(nested, shift, stage)
        return nested, shift

    def _check(self, name: str, raws: Mapping[str, Tensor]) -> None:
        if name not in raws:
            raise InputError(
                f"embeddings of {', '.join(self.sizes)} required, got none of {name}; embed with that model too"
            )
        x = raws[name]
        if not x.is_floating_point() or x.shape[-1] != self.widths[name]:
            raise InputError(
                f"float embeddings of {self.widths[name]} features required for {name}, got {x.dtype} {tuple(x.shape)}"
            )
        if not bool(x.isfinite().all()):
            raise InputError(f"finite embeddings required, got NaN or infinity in {name}; embed again in float32")

    def config(self) -> dict[str, Any]:
        """What the saved chain says of itself (also `config.json` beside the tensors)."""
        return {
            "schema": SCHEMA,
            "sizes": self.sizes,
            "widths": self.widths,
            "matryoshka_dims": list(self.dims.values()),
            "truncate_dim": list(self.dims.values())[-1],
            "dims_by_size": self.dims,
            "fits": [asdict(stage.fit) for stage in self.stages],
            **self.record,
        }

    def save(self, folder: str | Path) -> None:
        """Write `chain.safetensors`, whole or not at all, with the configuration in its header, and `config.json` to read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{i}.{key}": getattr(s, key).cpu().contiguous() for i, s in enumerate(self.stages) for key in TENSORS
        }
        temporary = folder / f"{FILE}.tmp{os.getpid()}"
        try:
            save_file(tensors, temporary, metadata={"config": json.dumps(self.config(), allow_nan=False)})
            os.replace(temporary, folder / FILE)
        finally:
            temporary.unlink(missing_ok=True)
        write_json(folder / "config.json", self.config())

    @classmethod
    def load(cls, folder: str | Path) -> NestedChain:
        """Read a chain written by `save`."""
        path = Path(folder) / FILE
        remedy = "fit one with `distil-rank nested fit`"
        try:
            with safe_open(path, framework="pt") as file:
                config = json.loads((file.metadata() or {}).get("config", "{}"))
                if config.get("schema") != SCHEMA:
                    raise InputError(
                        f"a chain of schema {SCHEMA} required, got {config.get('schema')} in {path}; {remedy}"
                    )
                stages = tuple(
                    Stage(**{key: file.get_tensor(f"{i}.{key}") for key in TENSORS}, fit=Fit(**fit))
                    for i, fit in enumerate(config["fits"])
                )
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"a chain folder required, got {folder} ({error}); {remedy}") from None
        derived = ("schema", "sizes", "widths", "matryoshka_dims", "truncate_dim", "dims_by_size", "fits")
        return cls(config["widths"], stages, {k: v for k, v in config.items() if k not in derived})


def extended(nested: Tensor, shift: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
    """The affine map (matrix, shift) from raw embeddings side by side to nested_p, from that to nested_r."""
    A = (stage.directions / stage.scale[:, None]).T
    B = A @ stage.weight
    old = torch.cat([nested, nested.new_zeros(len(nested), A.shape[1])], 1)
    matrix = torch.cat([old, torch.cat([-B @ nested, A], 1)])
    return matrix, torch.cat([shift, B @ (stage.mean_prefix - shift) - A @ stage.mean_large])


def joined_moments(moments: Moments, nested: Tensor, shift: Tensor, columns: slice) -> Moments:
    """Moments of [nested_r, raw_p] from those of all sizes side by side; raw_p lies in `columns`, sizes up to r before."""
    before, scatter = nested.shape[1], moments.scatter
    across = nested @ scatter[:before, columns]
    among = symmetric_product(nested @ scatter[:before, :before], nested.T)
    joint = torch.cat([torch.cat([among, across], 1), torch.cat([across.T, scatter[columns, columns]], 1)])
    mean = torch.cat([nested @ moments.mean[:before] + shift, moments.mean[columns]])
    return Moments.from_state(
        {"count": torch.tensor(moments.count, dtype=torch.float64), "mean": mean, "scatter": joint}
    )


def offsets(widths: Mapping[str, int]) -> dict[str, slice]:
    """Where each size lies in the columns of all sizes side by side."""
    columns, start = {}, 0
    for name, width in widths.items():
        columns[name] = slice(start, start + width)
        start += width
    return columns
