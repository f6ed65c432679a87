"""Fill the generated blocks of README.md, docs/ and results/README.md from their JSON.

python -m benchmarks.documents    # also draws the figures of benchmarks and studies

A block stands between `<!-- begin NAME FILE -->` and `<!-- end -->`.
"""

import importlib
import re
from pathlib import Path

from distil_rank.core.errors import one_line_errors
from distil_rank.core.records import ROOT, read_json, write_text

# NAME -> module of benchmarks/ and its function of the record; the name of the record's schema
BLOCKS = {
    "overview": ("tables_experiment.overview", "SCHEMA"),
    "summary": ("tables_experiment.documentation", "SCHEMA"),
    "findings": ("tables_experiment.findings", "SCHEMA"),
    "embedding": ("embedding.table", "SCHEMA"),
    "splits": ("split_recall.table", "SCHEMA"),
    "store-races": ("store_races.table", "SCHEMA"),
    "scores": ("scores.table", "SCHEMA"),
    "lowrank": ("tables_experiment.bars", "BARS"),
    "compress": ("tables_compress.bars", "SCHEMA"),
    "compress-cells": ("tables_compress.cells", "SCHEMA"),
    "compress-models": ("tables_compress.models", "SCHEMA"),
    "compress-frontier": ("tables_compress.frontier", "SCHEMA"),
    "headline": ("tables_heads.headline", "SCHEMA"),
    "heads": ("tables_heads.sizes", "SCHEMA"),
    "heads-across": ("tables_heads.across", "SCHEMA"),
    "heads-times": ("tables_heads.times", "SCHEMA"),
    "heads-few": ("tables_heads.few_rows", "SCHEMA"),
    "nested": ("tables_nested.documentation", "SCHEMA"),
    "nested-curve": ("nested_curve.table", "SCHEMA"),
    "nested-benchmark": ("tables_nested.benchmark", "BENCHMARK"),
    "generators": ("generator_study.paper.paper", "SCHEMA"),
    "generators-bars": ("tables_generators.bars", "SCHEMA"),
}
# NAME of benchmarks/results/NAME.json -> what draws NAME.png beside it
FIGURES = {
    "compress": "tables_compress.draw_frontier",
    "heads": "tables_heads.draw",
    "nested_curve": "nested_curve.draw_curves",
}
BLOCK = re.compile(r"(<!-- begin (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def block(name: str, path: Path) -> str:
    """The text of one block; of a folder, from the summaries of all runs in it."""
    function, schema = BLOCKS[name]
    place, _, function = function.rpartition(".")
    tables = importlib.import_module(f"benchmarks.{place}")
    schema = getattr(tables, schema)
    if not path.is_dir():
        return getattr(tables, function)(read_json(path, schema))
    runs = sorted(path.rglob("distil_rank_summary.json"))
    records = [read_json(run, schema) for run in runs if run.parent.name != "quick"]
    return getattr(tables, function)(records)


def filled(text: str) -> str:
    """The document with every generated block made anew from its JSON."""
    return BLOCK.sub(lambda m: f"{m[1]}{block(m[2], ROOT / m[3])}\n{m[4]}", text)


def documents() -> list[Path]:
    """Every document of the project, with blocks or without."""
    fixed = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*fixed, *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]


def main() -> None:
    for name, function in FIGURES.items():
        place, _, draw_one = function.rpartition(".")
        tables = importlib.import_module(f"benchmarks.{place}")
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        getattr(tables, draw_one)(read_json(path, tables.SCHEMA))
        print(f"drawn: {path.with_suffix('.png').relative_to(ROOT)}")
    for study in sorted((ROOT / "results").rglob("study.json")):
        from benchmarks.generator_study.figures import draw

        for path in draw(study.parent):
            print(f"drawn: {path.relative_to(ROOT)}")
    for document in documents():
        write_text(document, filled(document.read_text()))
        print(f"filled: {document.relative_to(ROOT)}")


if __name__ == "__main__":
    with one_line_errors("benchmarks.documents"):
        main()
