"""Scalers of the released code of Reverse Distillation, read as a chain and written.

Catrina, Bepler, Sledzieski, Singh, "Reverse Distillation: Consistently Scaling Protein Language
Model Representations", ICLR 2026; github.com/rohitsinghlab/plm_reverse_distillation. A file a pair,
`rd-scaler-SMALL-LARGE-REGRESSION-PCA-PROTEINS.npz` (linear, ridge or pcr; fbpca or incremental):

| key | shape | what |
|---|---|---|
| `regressor__coef_`, `regressor__intercept_` | (k_p, q), (k_p,) | f, of z or its q components |
| `regressor__input_mean_`, `regressor__output_mean_` | (k_r,), (k_p,) | of pcr |
| `regressor__input_components_`, `regressor__n_significant_pcs_` | (k_r, >= q), () | of pcr |
| `pca__components_`, `pca__mean_` | (m, k_p), (k_p,) | of the residual, orthonormal rows |

Its forward is nested_p = [nested_r, (raw_p - f(nested_r) - mean) components^T], though f was fitted
on raw_r. Here f is applied to what it was fitted on: to raw_r as nested_r reconstructs it, which is
affine in nested_r. `as_released=True` applies it to nested_r, as the released code does.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.records import atomic, require_writable, sha256
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.stage import Fit, Stage

NAME = re.compile(r"rd-scaler-([^-]+)-([^-]+)-(linear|ridge|pcr)-(?:fbpca|incremental)-.+\.npz")
FITTED_ON_NESTED = "distil_rank__fitted_on_nested"  # of files that `write_scalers` wrote


def read_scalers(path: str | Path, as_released: bool = False) -> NestedChain:
    """The chain of the scalers in a folder, one a pair; InputError where they form no chain."""
    files = sorted(p for p in Path(path).glob("*.npz") if NAME.fullmatch(p.name))
    pairs = {}
    for file in files:
        small, large, _ = NAME.fullmatch(file.name).groups()  # type: ignore[union-attr]
        pairs[small] = large, file
    first = next((name for name in pairs if name not in {large for large, _ in pairs.values()}), "")
    sizes = [first]
    while sizes[-1] in pairs and len(sizes) <= len(pairs):
        sizes.append(pairs[sizes[-1]][0])
    if not files or not len(files) == len(pairs) == len(sizes) - 1:
        got = ", ".join(file.name for file in files) or "none"
        raise InputError(f"one scaler of each pair of sizes required in {path}, got {got}")
    found = {large: _read(file) for large, file in map(pairs.__getitem__, sizes[:-1])}
    stages = {name: stage for name, (stage, _) in found.items()}
    widths = {first: found[sizes[1]][0].weight.shape[1]}
    widths |= {name: len(stage.weight) for name, stage in stages.items()}
    nested = {on_nested for _, on_nested in found.values()}
    if len(nested) > 1:
        raise InputError(f"scalers by one writer required in {path}, got released and our own")
    kinds = {stage.fit.regression for stage in stages.values()}
    digests = {pairs[name][1].name: sha256(pairs[name][1]) for name in sizes[:-1]}
    record = {
        "options": {"regression": kinds.pop() if len(kinds) == 1 else "ols", "components": "mp"},
        "released": {"sha256": digests, "as_released": as_released},
    }
    return chained(stages, widths, as_released or nested == {True}, record)


def chained(
    stages: Mapping[str, Stage],
    widths: Mapping[str, int],
    as_released: bool = False,
    record: dict[str, object] | None = None,
) -> NestedChain:
    """A chain of stages that were fitted on raw_r, by their larger size."""
    found: list[Stage] = []
    for (before, _), (name, stage) in zip(widths.items(), stages.items()):
        prefix = found[-1].weight.shape[1] + found[-1].added if found else widths[before]
        if stage.weight.shape[1] != (prefix if as_released else widths[before]):
            got = f"{stage.weight.shape[1]} for {prefix} of {before}"
            raise InputError(f"{name}: scalers of equal widths in order required, got {got}")
        if found and not as_released:  # raw_r = offset + basis nested_r
            last = found[-1]
            basis = torch.cat([last.weight, last.directions], 1)
            offset = last.mean_large - last.weight @ last.mean_prefix
            shift = stage.weight @ (offset - stage.mean_prefix)
            mean, weight = stage.mean_large + shift, stage.weight @ basis
            origin = torch.zeros(prefix, dtype=torch.float64)
            stage = replace(stage, mean_prefix=origin, mean_large=mean, weight=weight)
        found.append(stage)
    return NestedChain(dict(widths), tuple(found), record or {})


def _read(path: Path) -> tuple[Stage, bool]:
    """The stage of one file as it is, and whether it was fitted on the nested prefix."""
    regression = NAME.fullmatch(path.name)[3]  # type: ignore[index]

    def tensor(key: str) -> Tensor:
        return torch.from_numpy(np.asarray(file[key], dtype=np.float64))

    try:
        with np.load(path, allow_pickle=False) as file:
            weight, large = tensor("regressor__coef_"), tensor("regressor__intercept_")
            prefix = torch.zeros(weight.shape[1], dtype=torch.float64)
            if regression == "pcr":
                kept = int(file["regressor__n_significant_pcs_"])
                weight = weight @ tensor("regressor__input_components_")[:, :kept].T
                prefix, output = (tensor(f"regressor__{side}put_mean_") for side in ("in", "out"))
                large = large + output
            V, large = tensor("pca__components_").T.contiguous(), large + tensor("pca__mean_")
            nested = FITTED_ON_NESTED in file
        shapes = prefix.shape == weight.shape[1:] and large.shape == weight.shape[:1] == V.shape[:1]
        if not (shapes and all(bool(t.isfinite().all()) for t in (weight, prefix, large, V))):
            raise ValueError("shapes do not agree, or values are not finite")
        if not torch.allclose(V.T @ V, torch.eye(V.shape[1]).double(), atol=1e-4):
            raise ValueError("the rows of pca__components_ are not orthonormal")
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        required = f"a released scaler ({regression}) required"
        raise InputError(f"{required}, got {path}: {error}; download it again") from None
    name = {"linear": "ols"}.get(regression, regression)
    fit = Fit(name, weight.shape[1], kept if regression == "pcr" else None)
    return Stage(prefix, large, weight, V, torch.empty(0).double(), fit), nested


def write_scalers(chain: NestedChain, folder: str | Path, proteins: str = "1k") -> list[Path]:
    """Write a chain as scalers that the released code reads: its forward is then the chain's.

    `proteins` ends the names, as the released code has it: 0.5k, 1k, 5k or 10k.
    """
    if odd := [size for size in chain.sizes if "-" in size]:
        raise InputError(f"names of sizes without a hyphen required, got {', '.join(odd)}")
    written = []
    for small, large, stage in zip(chain.sizes, chain.sizes[1:], chain.stages):
        path = require_writable(folder) / f"rd-scaler-{small}-{large}-linear-fbpca-{proteins}.npz"
        intercept = stage.mean_large - stage.weight @ stage.mean_prefix
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                regressor__coef_=stage.weight.numpy(),
                regressor__intercept_=intercept.numpy(),
                regressor__n_features_in_=stage.weight.shape[1],
                pca__mean_=np.zeros(len(intercept)),
                pca__components_=stage.directions.T.numpy(),
                pca__explained_variance_=stage.eigenvalues[: stage.added].numpy(),
                pca__n_components=stage.added,
                **{FITTED_ON_NESTED: True},
            )
        written.append(path)
    return written
