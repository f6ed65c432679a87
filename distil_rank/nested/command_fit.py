"""Fit a nested embedding of a model family: each prefix is the smaller models' embedding.

    distil-rank nested fit proteins.fasta --family esm2 --upto 650M --out chain/
    distil-rank nested fit proteins.fasta --family nano --directions 32 64 --out chain/
    distil-rank nested fit proteins.fasta --models small.pt medium.pt large.pt --out chain/
    distil-rank nested fit --stores small/ medium/ large/ --out chain/
    torchrun --nproc-per-node 4 -m distil_rank nested fit proteins.fasta --family esm2 --out chain/

Every model embeds the proteins in turn (one in memory at a time) into OUT/stores/; one streaming
pass gathers the moments of all sizes side by side, and every stage follows from those. Interrupted,
even killed? Run the same command again. OUT then holds the chain (chain.safetensors, config.json),
the moments behind it, for refits and baselines, and OUT/stores/, which may be deleted. <cls>, <eos>
and padding are never among the residues.

R^2 on held-out proteins is told for each stage, twice: of the large embedding predicted from the
prefix alone (regression), and reconstructed from the prefix and the new directions.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from distil_rank.core.devices import Group, process_group
from distil_rank.core.errors import InputError, at_least
from distil_rank.core.intervals import ratio_interval
from distil_rank.core.moments import Moments
from distil_rank.core.records import Metric, interval, require_writable
from distil_rank.core.resume import Checkpoint
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.report import fitted_text
from distil_rank.nested.rows import StoreRows, as_rows, check_order, is_held_out, joint_moments
from distil_rank.nested.sources import (
    family_sources,
    named_sources,
    raw_store,
    sample,
)
from distil_rank.nested.stage import COMPONENTS, check_regression

MOMENTS, HELD_OUT = "moments.safetensors", "held_out.safetensors"
# what a chain knows of the stores it was fitted on
REMEMBERED = "model", "weights_sha256", "pool", "dim", "dtype", "compute", "long", "max_length"


@dataclass(frozen=True)
class Config:
    out: Path  # where to write
    fasta: Annotated[Path | None, tyro.conf.Positional] = None  # FASTA of proteins to work on
    family: str | None = None  # a family of the model table: esm2 or nano
    upto: str | None = None  # the largest size of the family, e.g. 650M (default: all)
    models: tuple[str, ...] = ()  # models by name, file or folder, smallest first
    stores: tuple[Path, ...] = ()  # embedding stores of the same proteins, smallest first
    regression: Literal["ols", "ridge", "pcr"] = "pcr"  # of the large embedding on the prefix
    components: str = "mp"  # of pcr: mp (Marchenko-Pastur edge), held-out, or a number
    held_out: float = 0.1  # share of the proteins kept aside
    directions: tuple[int, ...] = ()  # of every size but the first (none: what its width adds)
    exact: bool = False  # moments by float64 products: a third of the speed
    max_proteins: int | None = None  # at most this many proteins, drawn at random
    seed: int = 0  # of everything random
    store_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of stored embeddings
    long: Literal["error", "truncate", "window"] = "error"  # what proteins over max_length become
    max_length: int = 1022  # longest protein in residues
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    """Fit and write a chain. InputError before anything is written where that can be known."""
    sources, components = _check(config)
    given = _open(config)
    sizes = list(given or sources)
    if config.directions and len(config.directions) != len(sizes) - 1:
        required = f"directions of {', '.join(sizes[1:])} required"
        raise InputError(f"{required}, got {len(config.directions)} numbers")
    require_writable(config.out)
    with process_group(config.device) as group:
        stores = given or _embed(config, sources, group)
        provenance = {name: part.store.provenance for name, part in stores.items()}
        partial = config.out / f"partial-{group.rank}-of-{group.world}.pt"
        state = Checkpoint(partial, config.held_out, config.exact, provenance)
        fitted, held_out = _gather(config, stores, group, state)
        if group.rank == 0:
            chain = _fit(config, stores, sources, components, fitted, held_out)
            fitted.save(config.out / MOMENTS, rows="fitted", sizes=list(stores))
            held_out.save(config.out / HELD_OUT, rows="held out", sizes=list(stores))
            chain.save(config.out)
            print(fitted_text(chain, config.out))
        group.barrier()
        state.clear()


def _check(config: Config) -> tuple[dict[str, str], str | int]:
    """The models by size, and the components; InputError where the flags do not fit together."""
    given = [name for name in ("family", "models", "stores") if getattr(config, name)]
    if len(given) != 1:
        got = ", ".join(given) or "none"
        raise InputError(f"one of --family, --models and --stores required, got {got}")
    if (config.fasta is None) != bool(config.stores):
        wanted = "no FASTA" if config.stores else "a FASTA file"
        raise InputError(f"{wanted} required with --{given[0]}, got {config.fasta}")
    at_least(1, max_proteins=config.max_proteins)
    if config.stores and config.max_proteins is not None:
        raise InputError("a FASTA required for --max-proteins, got --stores; embed fewer proteins")
    if config.upto is not None and config.family is None:
        raise InputError(f"--family required for --upto, got --{given[0]}; leave --upto out")
    components: str | int = config.components
    if config.components.isdigit():
        components = int(config.components)
    check_regression(config.regression, components)
    if not 0 <= config.held_out < 1:
        raise InputError(f"a held-out fraction in [0, 1) required, got {config.held_out}")
    if components == COMPONENTS[1] and config.held_out == 0:
        raise InputError(
            "held-out proteins required to choose the components, got --held-out 0; leave some out"
        )
    if config.family is not None:
        return family_sources(config.family, config.upto), components
    return named_sources(config.models), components


def _open(config: Config) -> dict[str, StoreRows]:
    """The stores of --stores: the same rows of the same kind, or an InputError."""
    stores: dict[str, StoreRows] = {}
    for path in config.stores:
        rows = StoreRows(path)
        name = rows.store.provenance["model"]
        if name in stores:
            remedy = "embed with each size once"
            raise InputError(f"stores of different models required, got {name} twice; {remedy}")
        stores[name] = rows
    if not stores:
        return {}
    as_rows(stores)
    known = {name: rows.store.provenance for name, rows in stores.items()}
    longer = any(one.get("longer_proteins") for one in known.values())
    for key in ("pool", *(("long", "max_length") if longer else ())):
        found = {name: one[key] for name, one in known.items()}
        if len(set(found.values())) > 1:
            got = ", ".join(f"{value} of {name}" for name, value in found.items())
            raise InputError(f"stores of one {key} required, got {got}; embed both the same way")
    check_order({name: rows.dim for name, rows in stores.items()})
    return stores


def _embed(config: Config, sources: Mapping[str, str], group: Group) -> dict[str, StoreRows]:
    """A store of every size, one model after the other."""
    assert config.fasta is not None
    fasta = config.fasta
    if config.max_proteins is not None:
        fasta = config.out / "proteins.fasta.gz"
        if group.rank == 0:
            sample(config.fasta, fasta, config.max_proteins, config.seed)
        group.barrier()
    stores = {}
    for size, model in sources.items():
        stores[size] = raw_store(fasta, model, config.out / "stores" / size, "residues", config)
    return stores


def _gather(
    config: Config, rows: Mapping[str, StoreRows], group: Group, state: Checkpoint
) -> tuple[Moments, Moments]:
    """Moments of the fitted and of the held-out proteins, of all ranks."""
    from tqdm import tqdm

    total = sum(next(iter(rows.values())).lengths) // group.world
    quiet = not sys.stderr.isatty() or group.rank > 0
    with tqdm(total=total, unit=" rows", desc="moments", disable=quiet) as bar:
        shard = group.rank, group.world
        options = config.held_out, state, shard, bar.update, config.exact
        fitted, held_out = joint_moments(rows, *options)
    return group.merge(fitted), group.merge(held_out)


def _fit(
    config: Config,
    stores: Mapping[str, StoreRows],
    sources: Mapping[str, str],
    components: str | int,
    fitted: Moments,
    held_out: Moments,
) -> NestedChain:
    """The chain, with all that it remembers of its origin."""
    widths = {name: rows.dim for name, rows in stores.items()}
    directions = dict(zip(list(stores)[1:], config.directions))
    options = config.regression, components, directions
    chain = NestedChain.fit_moments(fitted, widths, *options, held_out)
    known = {size: rows.store.provenance for size, rows in stores.items()}
    first = next(iter(known.values()))
    data = {key: first[key] for key in ("proteins", "residues", "proteins_sha256")}
    if config.fasta is not None:
        drawn = {"drawn": config.max_proteins, "seed": config.seed}
        data |= {"fasta": config.fasta.name, **drawn}
    models = {
        size: {**{key: one[key] for key in REMEMBERED}, "source": sources.get(size, one["model"])}
        for size, one in known.items()
    }
    record = {**chain.record, "models": models, "data": data, "held_out": config.held_out}
    record["held_out_r2"] = held_out_scores(chain, stores, config.held_out, held_out)
    return replace(chain, record=record)


def held_out_scores(
    chain: NestedChain, stores: Mapping[str, StoreRows], fraction: float, held_out: Moments
) -> dict[str, dict[str, Metric]]:
    """R^2 of each raw embedding from the prefix (`regression`) and with the new block.

    The latter is `reconstruction`. Measured through `embed` and `reconstruct` on the held-out
    proteins, whose moments are `held_out`, with intervals over proteins; empty below two proteins.
    """
    proteins = [i for i, k in enumerate(stores[chain.sizes[0]].keys) if is_held_out(k, fraction)]
    if len(proteins) < 2:
        return {}
    means = dict(zip(chain.sizes, held_out.mean.split(list(chain.widths.values()))))
    sums = {size: np.empty((len(proteins), 3)) for size in chain.sizes[1:]}
    for row, i in enumerate(proteins):
        raws = {size: stores[size].read(i, i + 1) for size in chain.sizes}
        z, steps = chain.embed(raws).double(), pairwise(chain.dims.values())
        for (start, stop), size, stage in zip(steps, chain.sizes[1:], chain.stages):
            blocks = z[:, start:start], z[:, start:stop]
            rebuilt = (stage.reconstruct(z[:, :start], block) for block in blocks)
            errors = [raws[size].double() - other for other in (means[size], *rebuilt)]
            sums[size][row] = [float(error.square().sum()) for error in errors]
    scores: dict[str, dict[str, Metric]] = {size: {} for size in sums}
    for size, found in sums.items():
        for k, kind in ((1, "regression"), (2, "reconstruction")):
            left, low, high = ratio_interval(found[:, k], found[:, 0], np.arange(len(found)))
            scores[size][kind] = interval(1 - left, 1 - high, 1 - low, True, n=len(found))
    return scores
