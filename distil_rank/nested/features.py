"""What the probe compares: raw embeddings, computed once, and representations made of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import itemgetter

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.resume import Cache
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.sources import Loader
from distil_rank.nested.stage import fixed_signs
from distil_rank.proteins.pooling import embed

POOLS = ("mean", "site")
DRAWS = 3  # random completions
Features = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Representation:
    """`features` maps raw embeddings (n, k) by size to (n, dim)."""

    name: str
    kind: str  # raw, concatenation, nested-*, naive-pca, random-completion
    dim: int
    features: Features
    draw: int | None = None  # number of the random completion


def raw_features(
    name: str,
    sequences: Sequence[str],
    positions: Sequence[Sequence[int]],
    loaders: Sequence[Loader],
    cache: Cache,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Tensor]]:
    """By pool, raw embeddings (n, k) of every size.

    `mean` is over all residues, `site` over the given positions of each sequence.
    """
    found: dict[str, dict[str, Tensor]] = {pool: {} for pool in POOLS}
    for loader in loaders:
        request = sequences, positions, loader.weights or loader.source
        make = partial(pooled, loader, sequences, positions, device)
        for pool, x in cache.tensors(f"{name}.{loader.size}", request, make).items():
            found[pool][loader.size] = x
    return found


def pooled(
    loader: Loader,
    sequences: Sequence[str],
    positions: Sequence[Sequence[int]],
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Vectors (n, d) by pool."""
    model = loader.load(device).model
    result = {pool: torch.empty(len(sequences), model.width) for pool in POOLS}
    for i, (vectors,) in embed(model, sequences, "residues", (-1,)):
        result["mean"][i] = vectors.mean(0)
        result["site"][i] = vectors[list(positions[i])].mean(0)
    return result


def representations(
    chain: NestedChain, moments: Moments, held_out: Moments | None = None, seed: int = 0
) -> list[Representation]:
    """The chain and its baselines, all fitted on the same rows.

    `moments` are of all sizes side by side, `held_out` those of the proteins left out, for a chain
    whose components were chosen on them. The chain's own regression, the other one
    of PCR and OLS, raw sizes, concatenation, naive PCA of it at each scale, and random
    orthogonal completions.
    """
    widths, sizes, own = chain.widths, chain.sizes, list(chain.dims.values())
    dims = sorted({*own, *((a + b) // 2 for a, b in pairwise(own))})  # and half-way between two
    total = sum(widths.values())
    if moments.dim != total:
        required = f"moments of {total} features required for this chain"
        raise InputError(f"{required}, got {moments.dim}; fit it again")
    found = [Representation(f"raw_{n}", "raw", w, itemgetter(n)) for n, w in widths.items()]
    joined = lambda raws: torch.cat([raws[n] for n in sizes], -1)  # noqa: E731
    found.append(Representation("concatenation", "concatenation", total, joined))
    options = chain.record["options"]
    added = {name: stage.added for name, stage in zip(sizes[1:], chain.stages)}

    def refitted(seed: int | None = None, **changes: str) -> NestedChain:
        chosen = {**options, **changes, "directions": added, "held_out": held_out}
        return NestedChain.fit_moments(moments, widths, **chosen, random_seed=seed)

    found += nested(chain.kind, chain, dims)
    other = other_regression(options["regression"])
    ablation = refitted(regression=other)
    found += nested(ablation.kind, ablation, dims)
    for draw in range(DRAWS):  # as the chain in everything but the directions
        random = refitted(seed + draw)
        found += nested("random-completion", random, own[1:], draw)
    found += naive_pca(moments, chain, dims)
    return found


def other_regression(regression: str) -> str:
    """The ablation of a chain's regression."""
    return "ols" if regression != "ols" else "pcr"


def nested(
    kind: str, chain: NestedChain, dims: Sequence[int], draw: int | None = None
) -> Iterator[Representation]:
    """A chain cut at each of `dims`, called after the size that ends there."""
    suffix, sizes = "" if draw is None else f"#{draw}", {d: n for n, d in chain.dims.items()}
    for dim in dims:
        name = f"{kind}_{sizes.get(dim, f'dim{dim}')}{suffix}"
        features = lambda raws, dim=dim: chain.embed(raws, dim)  # noqa: E731 - a closure per dim
        yield Representation(name, kind, dim, features, draw)


def naive_pca(
    moments: Moments, chain: NestedChain, dims: Sequence[int]
) -> Iterator[Representation]:
    """PCA side by side of the sizes that the chain needs at each of `dims`: no larger one."""
    for dim in dims:
        sizes = chain.sizes_for(dim)
        own = moments.part(slice(0, sum(chain.widths[size] for size in sizes)))
        V = fixed_signs(torch.linalg.eigh(own.covariance)[1].flip(1)[:, :dim])
        features = lambda raws, sizes=sizes, mean=own.mean, V=V: (  # noqa: E731
            (torch.cat([raws[size].double() for size in sizes], -1) - mean) @ V
        )
        yield Representation(f"naive-pca_dim{dim}", "naive-pca", dim, features)
