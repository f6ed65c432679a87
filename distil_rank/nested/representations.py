"""What the probe compares, in one code path: features of a protein from the raw embeddings of every size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.nested.chain import NestedChain, offsets
from distil_rank.nested.single_pass import SinglePass
from distil_rank.nested.stage import fixed_signs
from distil_rank.core.moments import Moments


@dataclass(frozen=True)
class Representation:
    """`features` maps raw embeddings (n, k) by size to (n, dim)."""

    name: str
    kind: str  # raw, concatenation, nested-pcr, nested-ols, naive-pca, large-pca, random-completion, single-pass
    dim: int
    features: Callable[[Mapping[str, Tensor]], Tensor]
    draw: int | None = None  # number of the random completion


def principal(moments: Moments, columns: slice, names: Sequence[str], dims: Sequence[int]) -> dict[int, Callable]:
    """PCA of the sizes `names` side by side, which lie in `columns` of the moments: features for each of `dims`."""
    covariance = moments.covariance[columns, columns]
    basis = fixed_signs(torch.linalg.eigh(covariance)[1].flip(1))
    mean = moments.mean[columns]

    def features(dim: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return lambda raws: (torch.cat([raws[n].double() for n in names], -1) - mean) @ basis[:, :dim]

    return {dim: features(dim) for dim in dims}


def leading(moments: Moments, dim: int) -> Moments:
    """Moments of the first `dim` features."""
    state = moments.state()
    return Moments.from_state(
        {"count": state["count"], "mean": state["mean"][:dim], "scatter": state["scatter"][:dim, :dim]}
    )


def curve_dims(chain: NestedChain) -> list[int]:
    """The chain's dimensions and one half-way between each two."""
    dims = list(chain.dims.values())
    return sorted({*dims, *((a + b) // 2 for a, b in pairwise(dims))})


def representations(
    chain: NestedChain,
    moments: Moments,
    held_out: Moments | None = None,
    single_pass: SinglePass | None = None,
    draws: int = 3,
    seed: int = 0,
) -> list[Representation]:
    """The chain and its baselines, all fitted on the same rows: `moments` of all sizes side by side (more may follow).

    `held_out` are those of the proteins left out, for a chain whose components were chosen on them.

    The chain's own regression, the other one of PCR and OLS, raw sizes, concatenation, naive PCA of the concatenation,
    PCA of the largest, random orthogonal completions, and the single pass when there is one.
    """
    widths, sizes = chain.widths, chain.sizes
    total = sum(widths.values())
    if moments.dim < total:
        raise InputError(f"moments of {total} features required for this chain, got {moments.dim}; fit it again")
    own, own_held_out = leading(moments, total), None if held_out is None else leading(held_out, total)
    found = [Representation(f"raw_{n}", "raw", w, itemgetter(n)) for n, w in widths.items()]
    found.append(
        Representation("concatenation", "concatenation", total, lambda raws: torch.cat([raws[n] for n in sizes], -1))
    )
    options = chain.record["options"]
    added = {name: stage.added for name, stage in zip(sizes[1:], chain.stages)}
    dims = curve_dims(chain)

    def nested(kind: str, fitted: NestedChain, dims: Sequence[int], draw: int | None = None) -> None:
        suffix = "" if draw is None else f"#{draw}"
        for dim in dims:
            named = next((f"{kind}_{size}" for size, d in chain.dims.items() if d == dim), f"{kind}_dim{dim}")
            features = lambda raws, dim=dim: fitted.embed(raws, dim)  # noqa: E731 - a closure per dim
            found.append(Representation(named + suffix, kind, dim, features, draw))

    nested(f"nested-{options['regression']}", chain, dims)
    other = {**options, "regression": "ols" if options["regression"] != "ols" else "pcr"}
    fitted = NestedChain.fit_moments(own, widths, **other, directions=added, held_out=own_held_out)
    nested(f"nested-{other['regression']}", fitted, dims)
    for draw in range(draws):
        # as the chain in everything but the directions
        random = NestedChain.fit_moments(
            own, widths, **options, directions=added, held_out=own_held_out, random_seed=seed + draw
        )
        nested("random-completion", random, list(chain.dims.values())[1:], draw)
    for dim, features in principal(own, slice(0, total), sizes, dims).items():
        found.append(Representation(f"naive-pca_dim{dim}", "naive-pca", dim, features))
    largest = sizes[-1]
    below = [d for d in dims if d < widths[largest]]
    for dim, features in principal(own, offsets(widths)[largest], [largest], below).items():
        found.append(Representation(f"large-pca_dim{dim}", "large-pca", dim, features))
    if single_pass is not None:
        names = hidden_names(largest, single_pass.layers)
        features = lambda raws: single_pass.embed([raws[n] for n in names])  # noqa: E731
        found.append(Representation("single-pass", "single-pass", dims[-1], features))
    return found


def hidden_names(size: str, layers: Sequence[int]) -> list[str]:
    """Names of the hidden layers of a size among raw embeddings."""
    return [f"{size}@{layer}" for layer in layers]
