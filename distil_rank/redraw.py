"""Redraw every figure in results/ and every generated block of the documentation from the JSON beside them.

distil-rank report                  # all of results/, README.md and docs/
distil-rank report --results mine/  # the figures of another folder, and paper.md beside a study of generators
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distil_rank.core.errors import InputError
from distil_rank.generators import bars, paper
from distil_rank.compress import compress_tables
from distil_rank.experiment import tables
from distil_rank.nested import tables as nested_tables
from distil_rank.core.records import ROOT, read_json, write_text

# summary file -> module whose draw(folder) makes its figures
REPORTS = {
    "distil_rank_summary.json": "distil_rank.experiment.report",
    "report.json": "distil_rank.compress.model_report",
    "nested_summary.json": "distil_rank.nested.report",
    "study.json": "distil_rank.generators.report",
}
# `<!-- begin NAME FILE -->` ... `<!-- end -->` in a document is replaced by BLOCKS[NAME](FILE)
BLOCKS: dict[str, Callable[[Path], str]] = {
    "summary": lambda path: tables.documentation(read_json(path, tables.SCHEMA)),
    "findings": lambda folder: tables.findings(
        [
            read_json(path, tables.SCHEMA)
            for path in sorted(folder.rglob("distil_rank_summary.json"))
            if path.parent.name != "quick"
        ]
    ),
    "compress": lambda path: compress_tables.bars(read_json(path, compress_tables.SCHEMA)),
    "compress-cells": lambda path: compress_tables.cells(read_json(path, compress_tables.SCHEMA)),
    "compress-models": lambda path: compress_tables.models(read_json(path, compress_tables.SCHEMA)),
    "compress-pairs": lambda path: compress_tables.pairs(read_json(path, compress_tables.SCHEMA)),
    "compress-precision": lambda path: compress_tables.precision(read_json(path, compress_tables.SCHEMA)),
    "generators": lambda path: paper.paper(read_json(path, paper.SCHEMA)),
    "generators-bars": lambda path: bars.bars(read_json(path, bars.SCHEMA)),
    "nested": lambda path: nested_tables.documentation(read_json(path, nested_tables.SCHEMA)),
    "nested-benchmark": lambda path: nested_tables.benchmark(read_json(path, nested_tables.BENCHMARK)),
    "lowrank": lambda path: tables.bars(read_json(path, tables.BARS_SCHEMA)),
}
BLOCK = re.compile(r"(<!-- begin (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Config:
    results: Path = ROOT / "results"  # folder to search for summaries


def run(config: Config) -> None:
    found = [(path, module) for name, module in REPORTS.items() for path in sorted(config.results.rglob(name))]
    if not found:
        raise InputError(
            f"a folder with {' or '.join(REPORTS)} required, got {config.results}; run python main.py first"
        )
    for path, module in found:
        print(f"drawn: {importlib.import_module(module).draw(path.parent)}")
    if config.results.resolve() == ROOT / "results":
        for document in documents():
            write_text(document, filled(document.read_text()))
            print(f"filled: {document.relative_to(ROOT)}")
    else:
        for study in sorted(config.results.rglob("study.json")):
            write_text(study.with_name("paper.md"), paper.paper(read_json(study, paper.SCHEMA), figures=".") + "\n")
            print(f"written: {study.with_name('paper.md')}")


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]


def filled(text: str) -> str:
    """The document with every generated block made anew from its JSON."""
    return BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]](ROOT / m[3])}\n{m[4]}", text)
