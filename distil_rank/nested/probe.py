"""What a nested chain is worth on deep mutational scans, against its baselines, as ProteinGym's supervised protocol asks.

    distil-rank nested probe dms/ --chain chain/ --out results/nested
    distil-rank nested probe dms/ --chain chain/ --mutants 200 --locations train.fasta test.fasta --out results/nested
    torchrun --nproc-per-node 4 -m distil_rank nested probe dms/ --chain chain/ --out results/nested

dms/ holds NAME.csv (mutant,score) beside NAME.fasta (the wild type). Every mutant is embedded with every size; ridge on
mean-pooled and on mutated-position embeddings, three cross-validation schemes (random, modulo, contiguous), penalty by
nested cross-validation, Spearman over all out-of-fold predictions of an assay. The unit of every interval and test is the
assay. Writes OUT_summary.json and draws OUT_report.png from it. Interrupted? Run the same command again: what has been
embedded and scored is kept in CHAIN/probe/, which may be deleted.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from torch import Tensor

from distil_rank.core.devices import process_group
from distil_rank.nested import locations
from distil_rank.nested.assays import SCHEMES, Assay, folds, one_hot, read_assays
from distil_rank.nested.chain import FILE, NestedChain
from distil_rank.nested.compare import compare, mean_interval, monotonicity, spearman
from distil_rank.nested.features import POOLS, raw_features
from distil_rank.nested.fit import HELD_OUT, MOMENTS
from distil_rank.nested.report import draw_summary
from distil_rank.nested.representations import Representation, representations
from distil_rank.nested.ridge import RidgePath
from distil_rank.nested.single_pass import FILE as SINGLE_PASS
from distil_rank.nested.single_pass import SinglePass
from distil_rank.nested.stores import Loader, chain_models
from distil_rank.nested.tables import SCHEMA, comparison_table
from distil_rank.core.records import config_record, environment, read_json, require_writable, sha256, write_json
from distil_rank.core.moments import Moments

ASSAY_SCHEMA = "distil-rank/nested-assay/1"


@dataclass(frozen=True)
class Config:
    dms: Annotated[Path, tyro.conf.Positional]  # folder of NAME.csv (mutant,score) and NAME.fasta
    chain: Path  # folder written by `nested fit`
    out: Path = Path("results/nested")  # beginning of the names of the summary and the report
    mutants: int | None = None  # at most this many mutants per assay, drawn at random (default: all)
    locations: tuple[Path, ...] = ()  # two FASTA files with locations in the headers, to train and to test on
    location_proteins: int = 1500  # at most this many of each
    models: tuple[str, ...] = ()  # a model for each size, where the chain's own names cannot be found
    seed: int = 0  # of mutants, folds, random completions and resampling


def run(config: Config) -> None:
    """Score every representation on every assay and write summary and report. Raises InputError before work starts."""
    chain = NestedChain.load(config.chain)
    loaders = list(chain_models(chain, config.models).values())
    assays = read_assays(config.dms, config.mutants, config.seed)
    located = (
        locations.read_locations(config.locations, config.location_proteins, config.seed) if config.locations else None
    )
    single = SinglePass.load(config.chain) if (config.chain / SINGLE_PASS).exists() else None
    moments, held_out = (Moments.load(config.chain / name) for name in (MOMENTS, HELD_OUT))
    require_writable(config.out.parent)
    cache = require_writable(config.chain / "probe")
    layers = single.layers if single else ()
    with process_group() as group:
        compared = representations(chain, moments, held_out, single, seed=config.seed)
        for assay in assays[group.rank :: group.world]:
            _score(assay, chain, compared, loaders, layers, cache, config, group.device)
        group.barrier()
        if group.rank == 0:
            scores = {a.name: _score(a, chain, compared, loaders, layers, cache, config, group.device) for a in assays}
            record = summarise(config, chain, compared, scores)
            record["data"]["assays"] = [_described(a, config) for a in assays]
            record["single_pass"] = None if single is None else {"layers": single.layers, **single.record}
            if located:
                record["locations"] = _locations(config, chain, compared, located, loaders, layers, cache, group.device)
            record["environment"] = environment(group.device)
            write_json(f"{config.out}_summary.json", record)
            draw_summary(Path(f"{config.out}_summary.json"), Path(f"{config.out}_report.png"))
            print(comparison_table(record))
        group.barrier()


def _score(
    assay: Assay,
    chain: NestedChain,
    compared: Sequence[Representation],
    loaders: Sequence[Loader],
    layers: Sequence[int],
    cache: Path,
    config: Config,
    device: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """Spearman by pool, representation and scheme; computed once, then read from the cache."""
    asked = [sha256(config.chain / FILE), assay.mutants, assay.scores.tolist(), [r.name for r in compared], config.seed]
    path = cache / f"{assay.name}.{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.json"
    if path.exists():
        return read_json(path, ASSAY_SCHEMA)["spearman"]
    raws = raw_features(assay.name, assay.sequences, assay.positions, loaders, layers, cache, device)
    scores = score_assay(assay, raws, compared, config.seed)
    write_json(path, {"schema": ASSAY_SCHEMA, "spearman": scores})
    return scores


def score_assay(
    assay: Assay, raws: Mapping[str, Mapping[str, Tensor]], compared: Sequence[Representation], seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Spearman by pool, representation (and one-hot) and scheme, for raw embeddings by pool and size."""
    fold = {scheme: folds(assay.positions, scheme, seed) for scheme in SCHEMES}

    def score(features: Tensor) -> dict[str, float]:
        path = RidgePath(features)
        truth = assay.scores.numpy()
        return {s: spearman(path.nested(assay.scores, f)[0].numpy(), truth) for s, f in fold.items()}

    control = score(one_hot(assay))
    return {
        pool: {"one-hot": control, **{r.name: score(r.features(by_size)) for r in compared}}
        for pool, by_size in raws.items()
    }


def summarise(
    config: Config, chain: NestedChain, compared: Sequence[Representation], scores: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of a probe from the scores by assay: means over schemes, then over assays, and every comparison."""
    drawn = [r for r in compared if r.draw is not None]
    listed = [r for r in compared if r.draw is None]
    # random completions: the mean of the draws, as one representation
    merged = {r.name.partition("#")[0]: r for r in drawn}
    rows = [("one-hot", "one-hot", 0), *((r.name, r.kind, r.dim) for r in listed)]
    rows += [(name, r.kind, r.dim) for name, r in merged.items()]
    names = [name for name, _, _ in rows]

    def cell(assay: str, pool: str, name: str, scheme: str) -> float:
        found = scores[assay][pool]
        values = [
            found[n][scheme] for n in ([name] if name in found else [n for n in found if n.startswith(f"{name}#")])
        ]
        return float(np.mean(values))

    by_assay = {
        pool: {name: [float(np.mean([cell(a, pool, name, s) for s in SCHEMES])) for a in scores] for name in names}
        for pool in POOLS
    }
    means = {
        pool: {
            name: {
                "mean": mean_interval(by_assay[pool][name], config.seed),
                **{s: mean_interval([cell(a, pool, name, s) for a in scores], config.seed) for s in SCHEMES},
            }
            for name in names
        }
        for pool in POOLS
    }
    sizes, flat = chain.sizes, {f"{p}/{n}": v for p, by_name in by_assay.items() for n, v in by_name.items()}
    own = f"nested-{chain.record['options']['regression']}"
    pairs = [(f"{p}/{a}", f"{p}/{b}") for p in POOLS for a, b in planned_pairs(own, chain, names)]
    chains = {"nested": [sizes[0], *sizes[1:]], "raw": sizes}
    models = {size: {k: v for k, v in m.items() if k != "source"} for size, m in chain.record.get("models", {}).items()}
    return {
        "schema": SCHEMA,
        "config": {**config_record(config), "models": [Path(m).name for m in config.models]},
        "seeds": [config.seed],
        "data": {"chain": chain.record.get("data", {}), "models": models},
        "chain": {
            "regression": own,
            "dims": chain.dims,
            "options": chain.record["options"],
            "fits": [asdict(stage.fit) for stage in chain.stages],
            "rows": chain.record["rows"],
            "r2": chain.record["r2"],
            "held_out_r2": chain.record.get("held_out_r2", {}),
            "residual_spectrum": {n: _spectrum(s.eigenvalues) for n, s in zip(sizes[1:], chain.stages)},
            "added": {n: s.added for n, s in zip(sizes[1:], chain.stages)},
        },
        "representations": [{"name": n, "kind": k, "dim": d} for n, k, d in rows],
        "assays": list(scores),
        "schemes": list(SCHEMES),
        "spearman": means,
        "spearman_by_assay": by_assay,
        "comparisons": compare(flat, pairs, config.seed),
        "monotonicity": {
            pool: {
                kind: monotonicity([by_assay[pool][_sized(kind, own, size, sizes)] for size in names_], config.seed)
                for kind, names_ in chains.items()
            }
            for pool in POOLS
        },
        "machine_dependent": ["environment"],
    }


def planned_pairs(own: str, chain: NestedChain, names: Sequence[str]) -> list[tuple[str, str]]:
    """The comparisons asked beforehand: the chain against every control at its width, at each size; ablations; single pass."""
    pairs = []
    for size in chain.sizes[1:]:
        dim = chain.dims[size]
        other = "nested-ols" if own != "nested-ols" else "nested-pcr"
        theirs = [
            f"raw_{size}",
            f"random-completion_{size}",
            f"naive-pca_dim{dim}",
            f"large-pca_dim{dim}",
            f"{other}_{size}",
        ]
        if size == chain.sizes[-1]:
            theirs += [f"raw_{chain.sizes[0]}", "concatenation", "one-hot"]
        pairs += [(f"{own}_{size}", name) for name in theirs if name in names]
    if "single-pass" in names:
        pairs += [("single-pass", f"{own}_{chain.sizes[-1]}"), ("single-pass", f"raw_{chain.sizes[-1]}")]
    return pairs


def _sized(kind: str, own: str, size: str, sizes: Sequence[str]) -> str:
    return f"raw_{size}" if kind == "raw" or size == sizes[0] else f"{own}_{size}"


def _spectrum(eigenvalues: Tensor) -> list[float]:
    """Share of the residual's variance beyond the first i directions, i = 0 ... k, rounded for the record."""
    tails = eigenvalues.flip(0).cumsum(0).flip(0) / eigenvalues.sum()
    return [float(f"{v:.5g}") for v in [*tails.tolist(), 0.0]]


def _described(assay: Assay, config: Config) -> dict[str, Any]:
    file = config.dms / f"{assay.name}.csv"
    counts = {"measured": assay.measured, "used": len(assay.mutants), "length": len(assay.wild_type)}
    return {"name": assay.name, "sha256": sha256(file), **counts}


def _locations(
    config: Config,
    chain: NestedChain,
    compared: Sequence[Representation],
    located: tuple[locations.Located, locations.Located],
    loaders: Sequence[Loader],
    layers: Sequence[int],
    cache: Path,
    device: Any,
) -> dict[str, Any]:
    train, test = located
    raws = [
        raw_features(f"locations-{side}", part.sequences, None, loaders, layers, cache, device)["mean"]
        for side, part in zip(("train", "test"), located)
    ]
    features = {r.name: (r.features(raws[0]), r.features(raws[1])) for r in compared if r.draw in (None, 0)}
    features["composition"] = (locations.composition(train), locations.composition(test))
    correct = {
        name.partition("#")[0]: locations.hits(a, train.labels, b, test.labels, len(train.classes), config.seed)
        for name, (a, b) in features.items()
    }
    own = f"nested-{chain.record['options']['regression']}_{chain.sizes[-1]}"
    most = int(train.labels.bincount().argmax())
    return {
        "classes": train.classes,
        "n_train": len(train.labels),
        "n_test": len(test.labels),
        "sha256": [sha256(path) for path in config.locations],
        "majority_accuracy": float((test.labels == most).double().mean()),
        "reference": own,
        "results": locations.accuracies(correct, own, config.seed),
    }
