"""A nested embedding of a model family: every prefix is that of the smaller models.

    chain = NestedChain.fit({"8M": h8, "35M": h35, "650M": h650}, regression="pcr")
    z = chain.embed({"8M": h8, "35M": h35, "650M": h650})   # (..., 1280); z[..., :320] is h8
    z = chain.embed({"8M": h8, "35M": h35}, dim=480)        # the same columns, without the 650M
    chain.reconstruct(z, "650M")                            # raw_650M from the nested embedding

Each stage is fitted on nested_r, which is what it is applied to, never on raw_r. All stages come
from one streaming pass over the moments of all sizes side by side: nested_r is affine in the raw
embeddings, so the joint moments of [nested_r, raw_p] are an affine image of those. For the same
reason the nested embedding of a mean is the mean of the nested ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import Record, load_tensors, save_tensors, write_json
from distil_rank.nested.rows import Rows, as_rows, check_order, joint_moments
from distil_rank.nested.stage import Fit, Stage, check_regression, fit_stage

SCHEMA = "distil-rank/nested-chain/1"
FILE = "chain.safetensors"
TENSORS = ("mean_prefix", "mean_large", "weight", "directions", "eigenvalues")


@dataclass(frozen=True)
class NestedChain:
    """Names and raw widths of the sizes, smallest first, and the stage between each two.

    >>> h = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
    >>> family = {"8M": h[:, :4], "35M": h}
    >>> torch.equal(NestedChain.fit(family).embed(family)[:, :4], h[:, :4])
    True
    """

    widths: dict[str, int]
    stages: tuple[Stage, ...]
    record: Record = field(default_factory=dict)  # options, R^2 per stage, provenance: JSON values

    @classmethod
    def fit(
        cls,
        stores: Mapping[str, Rows | Tensor | np.ndarray],
        regression: str = "pcr",
        components: str | int = "mp",
        directions: Mapping[str, int] | None = None,
        held_out: float = 0.1,
        exact: bool = False,
    ) -> NestedChain:
        """Fit on row-wise aligned embeddings by size, smallest first: arrays (n, k) or stores.

        `directions` gives the number of new directions of a size where it should not be k_p - k_r.
        A fraction `held_out` of the proteins (by sequence) is left for R^2 and for
        `components="held-out"`. `exact` multiplies in float64 (`joint_moments`), at a third of the
        speed.
        """
        check_regression(regression, components)
        rows = as_rows(stores)
        widths = {name: r.dim for name, r in rows.items()}
        check_order(widths)
        fitted, other = joint_moments(rows, held_out, exact=exact)
        return cls.fit_moments(fitted, widths, regression, components, directions, other)

    @classmethod
    def fit_moments(
        cls,
        moments: Moments,
        widths: Mapping[str, int],
        regression: str = "pcr",
        components: str | int = "mp",
        directions: Mapping[str, int] | None = None,
        held_out: Moments | None = None,
        random_seed: int | None = None,
    ) -> NestedChain:
        """Fit from the moments of all sizes side by side, in the order of `widths`.

        With `random_seed`, the new directions are a random orthonormal completion (a baseline).
        """
        added = _added(moments, widths, directions or {})
        held_out = held_out if held_out is not None and held_out.count >= 2 else None
        first, *others = widths
        nested, shift = torch.eye(widths[first]).double(), torch.zeros(widths[first]).double()
        stages, r2, smaller = [], {}, first
        for name in others:
            joint = joined_moments(moments, nested, shift, widths[name])
            other = held_out and joined_moments(held_out, nested, shift, widths[name])
            stage = fit_stage(
                joint,
                len(nested),
                added[name],
                regression,
                components,
                other,
                None if random_seed is None else generator(random_seed, "completion", name),
                f"{smaller} -> {name}",
            )
            stages.append(stage)
            r2[name] = {"fit": stage.scores(joint), "held_out": other and stage.scores(other)}
            nested, shift = stage.extended(nested, shift)
            smaller = name
        rows = {"fit": moments.count, "held_out": held_out.count if held_out else 0.0}
        options = {"regression": regression, "components": components}
        return cls(dict(widths), tuple(stages), {"options": options, "rows": rows, "r2": r2})

    def scores(self, moments: Moments) -> dict[str, dict[str, float]]:
        """R^2 of each raw embedding (`Stage.scores`) on the rows behind moments of all sizes."""
        first, *others = self.widths
        nested = torch.eye(self.widths[first], dtype=torch.float64)
        shift, found = torch.zeros(len(nested), dtype=torch.float64), {}
        for name, stage in zip(others, self.stages):
            found[name] = stage.scores(joined_moments(moments, nested, shift, self.widths[name]))
            nested, shift = stage.extended(nested, shift)
        return found

    @property
    def sizes(self) -> list[str]:
        return list(self.widths)

    @property
    def kind(self) -> str:
        """What the probe calls the chain."""
        return f"nested-{self.record['options']['regression']}"

    @property
    def dims(self) -> dict[str, int]:
        """Width of the nested embedding at each size: the Matryoshka dimensions."""
        steps = self.widths[self.sizes[0]], *(stage.added for stage in self.stages)
        return dict(zip(self.sizes, itertools.accumulate(steps)))

    def sizes_for(self, dim: int | None = None) -> list[str]:
        """The models that an embedding of `dim` needs; InputError where there is no such one."""
        if dim is None:
            return self.sizes
        dims = self.dims
        low, *_, high = dims.values()
        if not low <= dim <= high:
            listed = ", ".join(f"{d} ({name})" for name, d in dims.items())
            raise InputError(
                f"a dim between {low} and {high} required, best one of {listed}; got {dim}"
            )
        return [n for i, n in enumerate(self.sizes) if i == 0 or dims[self.sizes[i - 1]] < dim]

    def embed(
        self,
        raws: Mapping[str, Tensor | np.ndarray],
        dim: int | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Nested embedding (..., dim) of raw embeddings (..., k) by size.

        In the dtype of the smallest, which is copied. `dim` cuts the embedding (default: the whole
        chain); models beyond it are not needed. `normalize` divides by the L2 norm after the cut.
        """
        needed = self.sizes_for(dim)
        z, *others = (self._checked(name, raws.get(name)) for name in needed)
        for name, x, stage in zip(needed[1:], others, self.stages):
            if x.shape[:-1] != z.shape[:-1] or x.device != z.device:
                got = f"{tuple(x.shape)} of {name} for {tuple(z.shape)} so far"
                raise InputError(f"row-wise aligned embeddings required, got {got}")
            count = stage.added if dim is None else min(stage.added, dim - z.shape[-1])
            block = stage.block(z, x, count).to(z.dtype)
            if not bool(block.isfinite().all()):
                raise InputError(
                    f"finite embeddings that {z.dtype} can hold required, got NaN or infinity at"
                    f" {name}; use float32"
                )
            z = torch.cat([z, block], -1)
        z = z[..., :dim]
        return torch.nn.functional.normalize(z, dim=-1) if normalize else z

    def reconstruct(self, z: Tensor | np.ndarray, size: str) -> Tensor:
        """Raw embedding of one size (..., k_p) from a nested one that reaches into it."""
        z = torch.as_tensor(z)
        if size not in self.widths:
            raise InputError(f"one of the sizes {', '.join(self.sizes)} required, got {size!r}")
        index = self.sizes.index(size)
        if index == 0:
            return z[..., : self.widths[size]]
        stage, prefix = self.stages[index - 1], self.dims[self.sizes[index - 1]]
        if z.shape[-1] < prefix:
            required = f"a nested embedding of at least {prefix} dims required to reconstruct"
            raise InputError(f"{required} {size}, got {z.shape[-1]}")
        block = z[..., prefix : prefix + stage.added]
        return stage.reconstruct(z[..., :prefix], block).to(z.dtype)

    def _checked(self, name: str, raw: Tensor | np.ndarray | None) -> Tensor:
        width = self.widths[name]
        required = f"finite float embeddings of {width} features required for {name}"
        if raw is None:
            raise InputError(f"{required}, got none of {name}; embed with that model too")
        x = torch.as_tensor(raw)
        if not x.is_floating_point() or x.shape[-1] != width:
            raise InputError(f"{required}, got {x.dtype} {tuple(x.shape)}")
        if not bool(x.isfinite().all()):
            raise InputError(f"{required}, got NaN or infinity in {name}; embed again in float32")
        return x

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> NestedChain:
        """Read a chain of a local folder or file, or of a repository on the Hugging Face hub."""
        from distil_rank.nested.hub import download

        return cls.load(download(str(name), revision))

    def push_to_hub(self, repo: str, private: bool = False) -> str:
        """Upload chain, configuration and card to the Hugging Face hub; returns the address."""
        from distil_rank.nested.hub import upload

        return upload(self, repo, private)

    def config(self) -> Record:
        """What the saved chain says of itself (also `config.json` beside the tensors)."""
        return {
            "schema": SCHEMA,
            "sizes": self.sizes,
            "widths": self.widths,
            "dims_by_size": self.dims,
            "fits": [asdict(stage.fit) for stage in self.stages],
            **self.record,
        }

    def save(self, folder: str | Path) -> None:
        """Write `chain.safetensors`, its configuration in the header, and `config.json` to read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{i}.{key}": getattr(stage, key)
            for i, stage in enumerate(self.stages)
            for key in TENSORS
        }
        save_tensors(folder / FILE, tensors, SCHEMA, config=self.config())
        write_json(folder / "config.json", self.config())

    @classmethod
    def load(cls, path: str | Path) -> NestedChain:
        """Read a chain written by `save`: the folder, or `chain.safetensors` itself."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        tensors, metadata = load_tensors(file, SCHEMA, "a nested chain")
        config = metadata["config"]
        if config["options"].pop("scale_features", False):
            raise InputError(f"a chain without --scale-features required, got {file}; fit it again")
        stages = tuple(
            Stage(**{key: tensors[f"{i}.{key}"] for key in TENSORS}, fit=Fit(**fit))
            for i, fit in enumerate(config["fits"])
        )
        empty = cls(config["widths"], stages)
        return cls(
            empty.widths, stages, {k: v for k, v in config.items() if k not in empty.config()}
        )


def _added(
    moments: Moments, widths: Mapping[str, int], directions: Mapping[str, int]
) -> dict[str, int]:
    """Number of new directions of every size but the first; InputError where it cannot be."""
    check_order(widths)
    total = sum(widths.values())
    if moments.dim != total or moments.count < 2:
        got = f"{moments.count:.0f} of {moments.dim}; give more proteins or gather them again"
        raise InputError(f"moments of at least 2 rows of {total} features required, got {got}")
    added = {b: widths[b] - widths[a] for a, b in itertools.pairwise(widths)}
    possible = all(name in added and 1 <= m <= widths[name] for name, m in directions.items())
    if not possible:
        known = ", ".join(f"{name} (1 to {widths[name]})" for name in added)
        raise InputError(f"directions of {known} required, got {dict(directions)}")
    return {**added, **directions}


def joined_moments(moments: Moments, nested: Tensor, shift: Tensor, width: int) -> Moments:
    """Moments of [nested_r, raw_p] from those of all sizes side by side.

    nested_r = nested @ (sizes up to r) + shift; raw_p, `width` features, comes next.
    """
    before = nested.shape[1]
    prefix = moments.part(slice(0, before)).mapped(nested, shift)
    large = moments.part(slice(before, before + width))
    across = nested @ moments.scatter[:before, before : before + width]
    rows = torch.cat([prefix.scatter, across], 1), torch.cat([across.T, large.scatter], 1)
    mean, count = torch.cat([prefix.mean, large.mean]), torch.tensor(moments.count).double()
    return Moments.from_state({"count": count, "mean": mean, "scatter": torch.cat(rows)})
