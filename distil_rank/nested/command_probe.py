"""What a nested chain is worth on mutational scans, as ProteinGym's supervised protocol asks.

    distil-rank nested probe dms/ --chain chain/ --out results/
    distil-rank nested probe dms/ --chain chain/ --mutants 200 --locations a.fasta b.fasta --out r/
    torchrun --nproc-per-node 2 -m distil_rank nested probe dms/ --chain chain/ --out results/

dms/ holds ProteinGym's files as they are (with DMS_substitutions.csv there or beside it), or
NAME.csv (mutant,score) beside NAME.fasta (the wild type). Every mutant is embedded with every size;
ridge on mean-pooled and on mutated-position embeddings, three cross-validation schemes
(random, modulo, contiguous), penalty by nested cross-validation, Spearman over all out-of-fold
predictions of an assay, in units of the training folds. The unit of every interval and test is the
assay. --locations and --residues add classification of proteins and residues (nested/tasks.py).
Writes OUT/nested_summary.json and draws OUT/nested_report.png from it. Interrupted? Run the
same command again: what has been embedded and scored is kept in CHAIN/probe/, which may be deleted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from distil_rank.core.devices import process_group
from distil_rank.core.errors import InputError, at_least
from distil_rank.core.moments import Moments
from distil_rank.core.records import (
    Record,
    config_record,
    environment,
    require_writable,
    sha256,
    write_json,
)
from distil_rank.core.resume import Cache, fingerprint
from distil_rank.nested.chain import FILE, NestedChain
from distil_rank.nested.command_fit import HELD_OUT, MOMENTS
from distil_rank.nested.compare import summary
from distil_rank.nested.features import raw_features, representations
from distil_rank.nested.probe import score_assay
from distil_rank.nested.report import SCHEMA, SUMMARY, comparison_table, draw
from distil_rank.nested.rows import StoreRows
from distil_rank.nested.sources import Loader, chain_models, raw_store
from distil_rank.nested.tasks import SIDES, Task, measure, read_locations, read_residues
from distil_rank.proteins.fasta import Protein, write_fasta
from distil_rank.proteins.variants import Assay, read_assays


@dataclass(frozen=True)
class Config:
    dms: Annotated[Path, tyro.conf.Positional]  # folder of NAME.csv (mutant,score) and NAME.fasta
    chain: Path  # folder written by `nested fit`
    out: Path  # where to write
    mutants: int | None = None  # at most this many mutants an assay, drawn at random
    locations: tuple[Path, ...] = ()  # two FASTA files with locations in the headers: train, test
    residues: tuple[Path, ...] = ()  # NAME_sampled.fasta files of classes, a letter per residue
    max_proteins: int | None = None  # at most this many proteins, drawn at random
    models: tuple[str, ...] = ()  # models by name, file or folder, smallest first
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    """Score every representation and write summary and report. InputError before work starts."""
    at_least(1, mutants=config.mutants, max_proteins=config.max_proteins)
    chain = NestedChain.load(config.chain)
    loaders = chain_models(chain, config.models)
    assays = read_assays(config.dms, config.mutants, config.seed)
    tasks = _tasks(config)
    moments, held_out = (Moments.load(config.chain / name) for name in (MOMENTS, HELD_OUT))
    require_writable(config.out)
    cache = Cache(require_writable(config.chain / "probe"))
    with process_group(config.device) as group:
        compared = representations(chain, moments, held_out, seed=config.seed)
        embedded = partial(
            raw_features, loaders=list(loaders.values()), cache=cache, device=group.device
        )

        def scored(assay: Assay) -> Record:
            names = [r.name for r in compared]
            request = sha256(config.chain / FILE), assay, names, config.seed

            def make() -> Record:
                raws = embedded(assay.name, assay.sequences, assay.positions)
                return score_assay(assay, raws, compared, config.seed)

            return cache.json(assay.name, request, make)

        longest = sorted(assays, key=lambda a: -len(a.mutants) * len(a.wild_type))
        for assay in longest[group.rank :: group.world]:
            scored(assay)
        stores = [_stores(config, loaders, task) for task in tasks]
        group.barrier()
        if group.rank == 0:
            scores = {assay.name: scored(assay) for assay in assays}
            record = {
                "schema": SCHEMA,
                "config": config_record(config),
                "seeds": [config.seed],
                "data": _data(config, chain, assays),
                "chain": _described(chain),
                **summary(chain, compared, assays, scores, config.seed),
                "environment": environment(group.device),
                "machine_dependent": ["environment"],
            }
            own = f"{chain.kind}_{chain.sizes[-1]}"
            record["tasks"] = {
                task.name: measure(task, rows, compared, own, config.seed)
                for task, rows in zip(tasks, stores)
            }
            write_json(config.out / SUMMARY, record)
            print(f"{comparison_table(record)}\n\n{draw(config.out)}")
        group.barrier()


def _described(chain: NestedChain) -> Record:
    """What the report shows of a chain."""
    shown, known = ("options", "fits", "rows", "r2", "held_out_r2"), chain.config()
    return {"regression": chain.kind, "dims": chain.dims, **{k: known.get(k, {}) for k in shown}}


def _data(config: Config, chain: NestedChain, assays: Sequence[Assay]) -> Record:
    models = chain.record.get("models", {})
    return {
        "chain": chain.record.get("data", {}),
        "models": {n: {k: v for k, v in m.items() if k != "source"} for n, m in models.items()},
        "assays": [
            {
                "name": assay.name,
                "sha256": sha256(config.dms / f"{assay.name}.csv"),
                "measured": assay.measured,
                "used": len(assay.mutants),
            }
            for assay in assays
        ],
    }


def _tasks(config: Config) -> list[Task]:
    found = [read_residues(path, config.max_proteins, config.seed) for path in config.residues]
    if config.locations:
        found.insert(0, read_locations(config.locations, config.max_proteins, config.seed))
    names = [task.name for task in found]
    if len(set(names)) < len(names):
        raise InputError(f"tasks of different names required, got {', '.join(names)}")
    return found


def _stores(config: Config, loaders: Mapping[str, Loader], task: Task) -> dict[str, StoreRows]:
    """Embeddings of the task's proteins by every size, kept beside the chain."""
    sequences = [sequence for side in SIDES for sequence, _ in task.proteins[side]]
    folder = config.chain / "probe" / f"{task.name}.{fingerprint(sequences)[:16]}"
    fasta = require_writable(folder) / "proteins.fasta"
    write_fasta(fasta, (Protein(str(i), str(i), s) for i, s in enumerate(sequences)))
    stores = {}
    for size, loader in loaders.items():
        loader.load()  # that it is the model the chain was fitted on
        stores[size] = raw_store(fasta, loader.source, folder / size, task.pool, config)
    return stores
