"""Redraw the figures of a results folder from the JSON beside them.

distil-rank report                  # all of results/
distil-rank report --results mine/  # those of another folder
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

from distil_rank.core.errors import InputError

# summary file -> module whose draw(folder) makes its figures and returns a path
REPORTS = {
    "distil_rank_summary.json": "distil_rank.experiment.report",
    "report.json": "distil_rank.compress.report",
    "nested_summary.json": "distil_rank.nested.report",
}


@dataclass(frozen=True)
class Config:
    results: Path = Path("results")  # folder to search for summaries


def run(config: Config) -> None:
    found = [
        (path.parent, module)
        for name, module in REPORTS.items()
        for path in sorted(config.results.rglob(name))
    ]
    if not found:
        raise InputError(
            f"a folder with {' or '.join(REPORTS)} required, got {config.results};"
            " run python main.py first"
        )
    for folder, module in found:
        print(f"drawn: {importlib.import_module(module).draw(folder)}")
