"""When a nested embedding pays: its accuracy less the raw model's, by proteins fitted and probed.

    python -m benchmarks.nested_curve    # writes benchmarks/results/nested_curve.{json,png}

A chain of the nano family is fitted on some proteins of human, yeast and E. coli; a linear probe of
residues (secondary structure, FLIP) or proteins (the four commonest locations, DeepLoc) is trained
on some others. Every draw takes its own proteins to fit, to train the probe and, with replacement,
to test, so that the interval over draws holds all three. Data: $DISTIL_RANK_DATA or ../shared/data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor

import distil_rank
from benchmarks import DATA
from distil_rank.core.figures import PALETTE, QUIET, drawn
from distil_rank.core.intervals import t_interval
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, Record, environment, interval, sha256, write_json
from distil_rank.core.tables import markdown, with_interval
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.features import Representation, nested
from distil_rank.nested.rows import TensorRows, joint_moments
from distil_rank.nested.tasks import SIDES, Task, measure, read_locations, read_residues
from distil_rank.proteins.fasta import clean_sequence, read_fasta

SCHEMA = "distil-rank/benchmark-nested-curve/1"
RESULT = ROOT / "benchmarks" / "results" / "nested_curve.json"
FILES = {
    "fitted": DATA / "proteins/human_yeast_ecoli.fasta.gz",
    "train": DATA / "proteins/deeploc_our_val_set.fasta",
    "test": DATA / "proteins/deeploc_test_set.fasta",
    "structure": DATA / "residues/secondary_structure_sampled.fasta.gz",
}
SIZES = {"64": "nano-64", "128": "nano-128", "256": "nano-256"}
FITTED = (10, 30, 100, 300, 1000)  # proteins of a chain
PROBED = {"secondary structure": (3, 10, 30, 100, 300), "location": (100, 200, 400, 600)}
DRAWS, TESTS, LONGEST, CLASSES = 8, 200, 400, 4
WIDTHS = list(SIZES)[1:]  # at which a prefix has a raw model beside it

Vectors = Mapping[str, Sequence[Tensor]]  # by size, of each protein (rows, d)


def embedded(sequences: Sequence[str], pool: str) -> dict[str, list[Tensor]]:
    """Vectors of every protein by every size."""
    found = {}
    for size, model in SIZES.items():
        vectors = distil_rank.embed(sequences, model, pool, device="cpu")
        found[size] = [v if v.ndim == 2 else v[None] for v in vectors]
    return found


def rows(vectors: Vectors, chosen: Sequence[int]) -> dict[str, TensorRows]:
    parts = {size: [of[i] for i in chosen] for size, of in vectors.items()}
    return {n: TensorRows(torch.cat(of), [len(x) for x in of]) for n, of in parts.items()}


def chains(vectors: Vectors, draw: int) -> dict[int, NestedChain]:
    """By number of proteins, each set within the next."""
    order = torch.randperm(FITTED[-1], generator=generator(draw, "fitted")).tolist()
    total, found = Moments(sum(of[0].shape[1] for of in vectors.values())), {}
    for before, count in zip((0, *FITTED), FITTED):
        part = rows(vectors, order[before:count])
        total = total.merge(joint_moments(part, 0)[0])
        widths = {size: of.dim for size, of in part.items()}
        found[count] = NestedChain.fit_moments(total, widths, "pcr")
    return found


def commonest(task: Task) -> Task:
    """The task with its commonest classes alone; rows of others do not count."""
    labels = torch.cat([found for _, found in task.proteins["train"]])
    kept = labels[labels >= 0].bincount().topk(min(CLASSES, len(task.classes))).indices.sort()
    number = torch.full((len(task.classes) + 1,), -1)
    number[kept.values] = torch.arange(len(kept.values))
    proteins = {
        side: [(s, number[found]) for s, found in of if (number[found] >= 0).any()]
        for side, of in task.proteins.items()
    }
    classes = [task.classes[i] for i in kept.values.tolist()]
    return replace(task, classes=classes, proteins=proteins)


def differences(
    task: Task, vectors: Vectors, fitted: Mapping[int, NestedChain], draw: int
) -> Record:
    """Accuracy of the chain's prefix less that of the raw model, by width, probed and fitted."""
    sizes = [len(task.proteins[side]) for side in SIDES]
    places = torch.arange(sum(sizes)).split(sizes)
    order = torch.randperm(sizes[0], generator=generator(draw, task.name, "probed"))
    tests = torch.randint(sizes[2], (sizes[2],), generator=generator(draw, task.name, "test"))
    compared = [Representation(f"raw_{n}", "raw", int(n), itemgetter(n)) for n in WIDTHS]
    for count, chain in fitted.items():
        for r in nested("nested", chain, list(chain.dims.values())[1:]):
            compared.append(replace(r, name=f"{r.name} {count}"))
    found: Record = {}
    for count in PROBED[task.name]:
        chosen = [order[:count], torch.arange(sizes[1]), tests]
        proteins = {s: [task.proteins[s][i] for i in of] for s, of in zip(SIDES, chosen)}
        stores = rows(vectors, torch.cat([p[c] for p, c in zip(places, chosen)]).tolist())
        part = replace(task, proteins=proteins)
        results = measure(part, stores, compared, "raw_256", draw)["results"]  # type: ignore[arg-type]
        accuracy = {name: of["accuracy"]["value"] for name, of in results.items()}
        for n in WIDTHS:
            for fit in fitted:
                key = f"{n} {count} {fit}"
                found[key] = accuracy[f"nested_{n} {fit}"] - accuracy[f"raw_{n}"]
            found[f"{n} {count} raw"] = accuracy[f"raw_{n}"]
    return found


def tasks() -> list[Task]:
    structure = read_residues(FILES["structure"], PROBED["secondary structure"][-1], 0)
    location = read_locations([FILES["train"], FILES["test"]], None, 0)
    few = {s: of[: TESTS if s != "train" else None] for s, of in structure.proteins.items()}
    return [replace(structure, name="secondary structure", proteins=few), commonest(location)]


def main() -> None:
    torch.set_num_threads(1)
    every = sorted({clean_sequence(p.sequence) for p in read_fasta(FILES["fitted"])})
    short = [s for s in every if len(s) <= LONGEST]
    picked = torch.randperm(len(short), generator=generator(0, "proteins"))[: FITTED[-1]]
    basis = embedded([short[i] for i in picked.tolist()], "residues")
    record: Record = {"schema": SCHEMA, "draws": DRAWS, "fitted": list(FITTED), "tasks": {}}
    for task in tasks():
        sequences = [s for side in SIDES for s, _ in task.proteins[side]]
        vectors = embedded(sequences, task.pool)
        found: list[Record] = []
        for draw in range(DRAWS):
            found.append(differences(task, vectors, chains(basis, draw), draw))
            print(task.name, draw, flush=True)
        values = {key: [one[key] for one in found] for key in found[0]}
        record["tasks"][task.name] = {
            "classes": task.classes,
            "proteins": {side: len(of) for side, of in task.proteins.items()},
            "probed": list(PROBED[task.name]),
            "cells": {
                key: interval(sum(of) / len(of), *t_interval(of), True, n=DRAWS)
                for key, of in values.items()
            },
        }
    record |= {"data": {name: sha256(path) for name, path in FILES.items()}}
    write_json(RESULT, record | {"environment": environment("cpu")})
    draw_curves(record)


def table(record: Record) -> str:
    """Percentage points by task, width, proteins of the probe and proteins of the chain."""
    head = ["task", "width", "proteins probed", "raw accuracy"]
    lines = [[*head, *(f"chain of {n:,} proteins" for n in record["fitted"])]]
    for name, task in record["tasks"].items():
        for width in WIDTHS:
            for probed in task["probed"]:
                cells = [task["cells"][f"{width} {probed} {n}"] for n in record["fitted"]]
                points = [{k: 100 * c[k] for k in ("value", "low", "high")} for c in cells]
                raw = f"{task['cells'][f'{width} {probed} raw']['value']:.3f}"
                shown = [with_interval(p, "+.1f") for p in points]
                lines.append([name, width, f"{probed:,}", raw, *shown])
    return markdown(lines)


def draw_curves(record: Record) -> None:
    """A panel for each task and width, a line for each number of proteins of the chain."""
    panels = [(task, width) for task in record["tasks"] for width in WIDTHS]
    with drawn(RESULT.with_suffix(".png"), (4.2 * len(panels) / 2, 7.2)) as figure:
        figure.set_layout_engine("constrained")
        for i, (name, width) in enumerate(panels):
            task, axis = record["tasks"][name], figure.add_subplot(2, len(panels) // 2, i + 1)
            for color, count in zip(PALETTE, record["fitted"]):
                cells = [task["cells"][f"{width} {n} {count}"] for n in task["probed"]]
                low, middle, high = ([100 * c[k] for c in cells] for k in ("low", "value", "high"))
                axis.plot(task["probed"], middle, "o-", color=color, label=f"{count:,} proteins")
                axis.fill_between(task["probed"], low, high, color=color, alpha=0.12, linewidth=0)
            axis.axhline(0, color=QUIET, linewidth=1, linestyle="--")
            axis.set(xscale="log", xlabel="proteins of the probe", ylabel="points of accuracy")
            axis.set_xticks(task["probed"], map(str, task["probed"]))
            axis.minorticks_off()
            axis.set_title(f"{name.capitalize()}, {width} dimensions", fontsize=11)
        lines = figure.axes[0].get_legend_handles_labels()
        figure.legend(*lines, title="chain fitted on", loc="outside lower center", ncols=5)
        figure.suptitle("Nested embedding less raw embedding: accuracy on held-out proteins")


if __name__ == "__main__":
    main()
