"""Slow, obvious versions of what the nested wing computes in closed form, from all the data."""

import numpy as np


def centred(x):
    return x - x.mean(0)


def ols(z, x):
    """Coefficients (k_z, k_x) of centred least squares."""
    return np.linalg.lstsq(centred(z), centred(x), rcond=None)[0]


def ridge(z, x, penalty):
    """Least squares on data augmented by sqrt(n penalty) I."""
    n, k = z.shape
    rows = np.vstack([centred(z), np.sqrt(n * penalty) * np.eye(k)])
    return np.linalg.lstsq(rows, np.vstack([centred(x), np.zeros((k, x.shape[1]))]), rcond=None)[0]


def gcv(z, x, penalties):
    """The penalty with the least GCV score, from the explicit hat matrix of every penalty."""
    n, scores = len(z), []
    for penalty in penalties:
        gram = centred(z).T @ centred(z) + n * penalty * np.eye(z.shape[1])
        hat = np.ones((n, n)) / n + centred(z) @ np.linalg.solve(gram, centred(z).T)
        scores.append(n * np.sum((x - hat @ x) ** 2) / (n - np.trace(hat)) ** 2)
    return penalties[int(np.argmin(scores))]


def pcr(z, x, components):
    """Least squares on the scores of the first principal components."""
    basis = np.linalg.svd(centred(z), full_matrices=False)[2][:components].T
    return basis @ np.linalg.lstsq(centred(z) @ basis, centred(x), rcond=None)[0]


def published_components(z):
    """The rule of the released code, from all the data: noise is the median below a first edge."""
    n, k = z.shape
    values = np.linalg.svd(centred(z), compute_uv=False) ** 2 / (n - 1)
    edge = (1 + np.sqrt(k / n)) ** 2
    noise = np.median(values[values / values.mean() < edge])
    kept = np.count_nonzero(values > noise * edge)
    shares = np.cumsum(values) / values.sum()
    return kept or next(q for q in range(1, k + 1) if shares[q - 1] >= 0.95)


def stage(z, x, coefficients, added):
    """Residual, its principal directions (k_x, added) and all its variances, by SVD."""
    residual = centred(x) - centred(z) @ coefficients
    _, singular, basis = np.linalg.svd(residual, full_matrices=False)
    basis = basis[:added].T
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(added)])
    return residual, basis, singular**2 / len(z)


def chain(raws, fit, added):
    """Nested embedding of a list of raw embeddings; fit(z, x) returns coefficients."""
    z = raws[0]
    for x, count in zip(raws[1:], added):
        residual, basis, _ = stage(z, x, fit(z, x), count)
        z = np.hstack([z, residual @ basis])
    return z
