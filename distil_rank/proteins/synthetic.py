"""Synthetic embeddings with the published statistics of mean-pooled ESM-2 650M; never for claims.

Matched (PCA of standardized features over 3.08 million metagenomic proteins): the cumulated
variance at 10, 20, 50 and 99 components, a flat remainder, the share of the mean in the energy, and
the two outlier features.
"""

import itertools
import math

import torch
from torch import Tensor

from distil_rank.core.randomness import generator

DIM = 1280
# of standardized features
CUMULATED_VARIANCE = {0: 0.0, 10: 0.402, 20: 0.532, 50: 0.710, 99: 0.808, DIM: 1.0}
MEAN_ENERGY = 0.87  # |mean|^2 / E|x|^2
OUTLIER_MEANS = {1160: -6.85, 234: -2.03}  # feature -> mean; all others are below about 1
OTHER_MEANS_STD = 0.25  # not published: keeps the other 1,278 means below 1


def synthetic_embeddings(n: int, seed: int, purpose: str) -> Tensor:
    """Gaussian rows (n, 1280) in float32; one population per seed, another sample per purpose."""
    population = generator(seed, "synthetic population")
    mean = OTHER_MEANS_STD * torch.randn(DIM, generator=population, dtype=torch.float64)
    for feature, value in OUTLIER_MEANS.items():
        mean[feature] = value
    factor = fourier_basis(population) * standardised_spectrum().sqrt()
    factor /= factor.square().sum(1, keepdim=True).sqrt()  # to unit variance, nearly so already
    std = (mean.square().sum() * (1 - MEAN_ENERGY) / MEAN_ENERGY / DIM).sqrt()
    rows = generator(seed, "synthetic rows", purpose)
    sample = torch.randn(n, DIM, generator=rows, dtype=torch.float64)
    return (mean + std * (sample @ factor.T)).float()


def fourier_basis(population: torch.Generator) -> Tensor:
    """Orthogonal (1280, 1280): sines and cosines side by side, features permuted, signs drawn.

    Neighboring eigenvalues are nearly equal and sin^2 + cos^2 = 1, so all features get the same
    variance at once.
    """
    position = torch.arange(DIM, dtype=torch.float64) * (2 * torch.pi / DIM)
    angles = position[:, None] * torch.arange(1, DIM // 2)
    waves = torch.stack([angles.cos(), angles.sin()], 2).reshape(DIM, DIM - 2) * (2 / DIM) ** 0.5
    flat = torch.stack([torch.ones(DIM), 1 - 2 * (torch.arange(DIM) % 2)], 1).double() / DIM**0.5
    signs = 2 * torch.randint(2, (DIM, 1), generator=population) - 1
    return signs * torch.cat([waves, flat], 1)[torch.randperm(DIM, generator=population)]


def standardised_spectrum() -> Tensor:
    """Eigenvalues (1280,) of the correlation matrix, descending, summing to 1280.

    Between two published points the spectrum falls geometrically, from the (geometric) middle of
    the neighboring levels, scaled so that the cumulated variance passes through the points; after
    the last one it is flat.
    """
    points = list(itertools.pairwise(CUMULATED_VARIANCE.items()))
    sizes = [stop - start for (start, _), (stop, _) in points]
    shares = [(above - below) * DIM for (_, below), (_, above) in points]
    levels = [share / size for share, size in zip(shares, sizes)]
    middle = [(one * other) ** 0.5 for one, other in itertools.pairwise(levels)]
    middle = [levels[0] ** 2 / middle[0], *middle]
    pieces = []
    for size, share, start, stop in zip(sizes[:-1], shares[:-1], middle, middle[1:]):
        fall = torch.logspace(math.log10(start), math.log10(stop), size, dtype=torch.float64)
        pieces.append(fall * (share / fall.sum()))
    pieces.append(torch.full((sizes[-1],), levels[-1], dtype=torch.float64))
    return torch.cat(pieces).sort(descending=True).values
