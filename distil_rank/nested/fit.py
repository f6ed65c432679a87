"""Fit a nested embedding of a model family: each prefix is the smaller models' embedding, bit for bit.

    distil-rank nested fit proteins.fasta --family esm2 --upto 650M --out chain/
    distil-rank nested fit proteins.fasta --family nano --single-pass --out chain/
    distil-rank nested fit proteins.fasta --models small.pt medium.pt large.pt --out chain/
    distil-rank nested fit --stores small/ medium/ large/ --out chain/
    torchrun --nproc-per-node 4 -m distil_rank nested fit proteins.fasta --family esm2 --upto 650M --out chain/

Every model embeds the proteins in turn (one in memory at a time) into OUT/stores/; one streaming pass gathers the moments
of all sizes side by side, and every stage follows from those. Interrupted, even killed? Run the same command again.
OUT then holds the chain (chain.safetensors, config.json), the moments behind it, for refits and baselines, and
OUT/stores/, which may be deleted. Rows are residues; <cls>, <eos> and padding are never among them.

R^2 on held-out proteins is told for each stage, twice: of the large embedding predicted from the prefix alone
(regression), and reconstructed from the prefix and the new directions.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from distil_rank.core.devices import Group, process_group
from distil_rank.core.errors import InputError
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.evaluate import held_out_scores
from distil_rank.nested.regression import COMPONENTS, check_regression
from distil_rank.nested.representations import hidden_names, leading
from distil_rank.nested.rows import Rows, as_rows, check_order, joint_moments
from distil_rank.nested.single_pass import SinglePass, default_layers
from distil_rank.nested.stores import Source, StoreRows, family_sources, named_sources, sample, store_provenance
from distil_rank.proteins import embeddings
from distil_rank.proteins.checkpoints import load_model
from distil_rank.core.records import require_writable

MOMENTS, HELD_OUT = "moments.safetensors", "held_out.safetensors"


@dataclass(frozen=True)
class Config:
    fasta: Annotated[Path | None, tyro.conf.Positional] = None  # proteins to fit on, plain or gzip; none with --stores
    out: Path = Path("chain")  # folder of the chain
    family: str | None = None  # a family of the model table: esm2 or nano
    upto: str | None = None  # the largest size of the family, e.g. 650M (default: all)
    models: tuple[str, ...] = ()  # instead of a family: models, smallest first
    stores: tuple[Path, ...] = ()  # instead of both: embedding stores of the same proteins, smallest first
    regression: Literal["ols", "ridge", "pcr"] = "pcr"  # of the large embedding on the prefix
    components: str = "mp"  # of pcr: mp (Marchenko-Pastur edge, as published), held-out, or a number
    scale_features: bool = False  # work in units of standard deviations, so that outlier features do not rule
    held_out: float = 0.1  # share of the proteins (by sequence) left out of the fit
    single_pass: bool = False  # also fit the map from the largest model's hidden layers to the nested embedding
    pool: Literal["residues", "mean"] = "residues"  # what a row is
    proteins: int | None = None  # fit on this many proteins of the FASTA, drawn at random (default: all)
    seed: int = 0  # of that draw
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the stored raw embeddings
    long: Literal["error", "truncate", "window"] = "error"  # what to do with proteins longer than max_length
    max_length: int = 1022  # residues in one forward pass


def run(config: Config) -> None:
    """Fit and write a chain. Raises InputError before anything is written where that can be known."""
    sources, components = _check(config)
    if config.stores:
        stores = _open(config)
        _enough(stores, config)  # before anything is written
    require_writable(config.out)
    with process_group() as group:
        if not config.stores:
            stores = _embed(config, sources, group)
        hidden = _hidden(stores, config)
        rows: dict[str, Rows] = {**as_rows(stores), **hidden}
        _enough(stores, config)
        fitted, held_out = _gather(config, rows, group)
        if group.rank == 0:
            _fit(config, stores, list(hidden), sources, components, fitted, held_out)
        group.barrier()
        _partial(config, group).unlink(missing_ok=True)


def _check(config: Config) -> tuple[list[Source], str | int]:
    given = [name for name in ("family", "models", "stores") if getattr(config, name)]
    if len(given) != 1:
        raise InputError(f"one of --family, --models and --stores required, got {', '.join(given) or 'none'}")
    if (config.fasta is None) != bool(config.stores):
        wanted = "no FASTA" if config.stores else "a FASTA file"
        raise InputError(f"{wanted} required with --{given[0]}, got {config.fasta}")
    components: str | int = config.components
    if config.components not in COMPONENTS:
        if not config.components.isdigit():
            raise InputError(f"components must be {', '.join(COMPONENTS)} or a number, got {config.components!r}")
        components = int(config.components)
    check_regression(config.regression, components)
    if not 0 <= config.held_out < 1:
        raise InputError(f"a held-out fraction in [0, 1) required, got {config.held_out}")
    if components == "held-out" and config.held_out == 0:
        raise InputError("held-out proteins required to choose the components, got --held-out 0; leave some out")
    if config.family is not None:
        return family_sources(config.family, config.upto), components
    return named_sources(config.models), components


def _open(config: Config) -> dict[str, StoreRows]:
    stores: dict[str, StoreRows] = {}
    for path in config.stores:
        rows = StoreRows(path)
        name = rows.store.provenance["model"]
        if name in stores:
            raise InputError(f"stores of different models required, got {name} twice; embed with each size once")
        stores[name] = rows
    as_rows(stores)
    return stores


def _enough(stores: Mapping[str, Rows], config: Config) -> None:
    """Refuse what no regression could fit: checked again, exactly, for every stage."""
    widths = {name: rows.dim for name, rows in stores.items()}
    check_order(widths)
    names, rows = list(widths), sum(next(iter(stores.values())).lengths)
    for a, b in zip(names, names[1:]):  # noqa: RUF007
        needed = widths[b] - widths[a] + 1 + (widths[a] if config.regression == "ols" else 0)
        if rows < needed:
            raise InputError(f"{a} -> {b}: at least {needed} rows required, got {rows}; give more proteins")


def _embed(config: Config, sources: list[Source], group: Group) -> dict[str, StoreRows]:
    """A store of every size, one model after the other."""
    assert config.fasta is not None
    fasta = config.fasta
    if config.proteins is not None:
        fasta = config.out / "proteins.fasta.gz"
        if group.rank == 0:
            sample(config.fasta, fasta, config.proteins, config.seed)
        group.barrier()
    stores = {}
    for source in sources:
        last = source is sources[-1]
        folder = config.out / "stores" / source.size
        layers: tuple[int, ...] = (-1,)
        if config.single_pass and last:
            layers = default_layers(len(load_model(source.model).model.layers))
        options = {"pool": config.pool, "dtype": config.dtype, "long": config.long, "max_length": config.max_length}
        folder.parent.mkdir(exist_ok=True)
        embeddings.run(embeddings.Config(fasta, source.model, folder, layers=layers, **options))  # type: ignore[arg-type]
        stores[source.size] = StoreRows(folder)
    return stores


def _hidden(stores: Mapping[str, StoreRows], config: Config) -> dict[str, StoreRows]:
    """The hidden layers of the largest model that its store holds."""
    if not config.single_pass:
        return {}
    size, rows = list(stores.items())[-1]
    layers = rows.store.provenance["layers"]
    if len(layers) < 2:
        raise InputError(
            f"hidden layers in the last store required, got layer {layers} alone; embed with several --layers"
        )
    return {name: StoreRows(rows.store.path, layer) for name, layer in zip(hidden_names(size, layers), layers)}


def _partial(config: Config, group: Group) -> Path:
    return config.out / f"partial-{group.rank}-of-{group.world}.safetensors"


def _gather(config: Config, rows: Mapping[str, Rows], group: Group) -> tuple[Any, Any]:
    from tqdm import tqdm

    total = sum(next(iter(rows.values())).lengths) // group.world
    quiet = not sys.stderr.isatty() or group.rank > 0
    with tqdm(total=total, unit=" rows", desc="moments", disable=quiet) as bar:
        parts = joint_moments(rows, config.held_out, _partial(config, group), (group.rank, group.world), bar.update)
    return group.merge(parts[0]), group.merge(parts[1])


def _fit(config, stores, hidden, sources, components, fitted, held_out) -> None:  # type: ignore[no-untyped-def]
    widths = {name: rows.dim for name, rows in stores.items()}
    total = sum(widths.values())
    own, own_held_out = leading(fitted, total), leading(held_out, total)
    options = (config.regression, components, config.scale_features)
    chain = NestedChain.fit_moments(own, widths, *options, held_out=own_held_out)
    by_size = {source.size: source.model for source in sources}
    provenance = store_provenance({name: rows.store for name, rows in stores.items()})
    for name, entry in provenance.items():
        entry["source"] = by_size.get(name, entry["model"])
    first = next(iter(stores.values())).store.provenance
    data = {key: first[key] for key in ("proteins", "residues", "proteins_sha256")}
    if config.fasta is not None:
        data |= {"fasta": config.fasta.name, "drawn": config.proteins, "seed": config.seed}
    record = {**chain.record, "models": provenance, "data": data, "held_out": config.held_out}
    if own_held_out.count >= 2:
        record["held_out_r2"] = held_out_scores(chain, stores, config.held_out, config.seed)
    chain = replace(chain, record=record)
    own_rows = {"sizes": list(widths), "hidden": hidden}
    fitted.save(config.out / MOMENTS, rows="fitted", **own_rows)
    held_out.save(config.out / HELD_OUT, rows="held out", **own_rows)
    if hidden:
        layers = [int(name.rpartition("@")[2]) for name in hidden]
        SinglePass.fit(chain, fitted, layers, held_out=held_out).save(config.out)
    chain.save(config.out)
    print(summary(chain, config.out))


def summary(chain: NestedChain, out: Path) -> str:
    """What was fitted, stage by stage."""
    lines = [f"{out}: " + " -> ".join(f"{name} ({dim})" for name, dim in chain.dims.items())]
    for name, stage in zip(chain.sizes[1:], chain.stages):
        r2 = chain.record["r2"][name]
        shown = r2["held_out"] or r2["fit"]
        where = "held-out" if r2["held_out"] else "fitted"
        fit = ", ".join(f"{k} {v}" for k, v in asdict(stage.fit).items() if v is not None)
        lines.append(
            f"  {name}: {where} R^2 {shown['regression']:.4f} from the prefix, {shown['reconstruction']:.4f} with the"
            f" {stage.added} new directions ({fit})"
        )
    return "\n".join(lines)
