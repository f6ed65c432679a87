"""What a head is for: labels, the metric that fits them, and its change with a paired interval."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.intervals import DRAWS, percentile_interval
from distil_rank.core.randomness import generator
from distil_rank.core.records import Metric, interval
from distil_rank.core.weights import read_tensors

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TaskChange:
    """A metric of the task on held-out rows, before and after, and after - before."""

    metric: str
    rows: int
    before: Metric
    after: Metric
    change: Metric


def load_labels(path: str | Path, rows: int) -> Array:
    """One number a row from .npy, .npz (y), .pt or .csv (one column, or the one named label)."""
    path = Path(path)
    if path.suffix == ".csv":
        labels = _csv_labels(path)
    else:
        found = read_tensors(path, "y")
        found = next(iter(found.values()), None) if isinstance(found, dict) else found
        if not isinstance(found, Tensor):
            got = type(found).__name__
            raise InputError(f"labels, one number a row, required in {path}, got {got}")
        labels = found.double().numpy()
    if labels.shape != (rows,) or not np.isfinite(labels).all():
        raise InputError(
            f"{rows} finite labels, one for each row of data, required in {path},"
            f" got shape {labels.shape}"
        )
    return labels


def _csv_labels(path: Path) -> Array:
    try:
        with path.open() as file:
            table = list(csv.reader(file))
        heading = "label" in table[0]
        column = table[0].index("label") if heading else 0
        return np.array([row[column] for row in table[heading:]], dtype=np.float64)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"readable labels, one number a row, required in {path}, got: {error}"
        ) from None


def auroc(outputs: Array, labels: Array) -> float:
    """Area under the ROC curve of the second class; NaN where there is one class."""
    if labels.min() == labels.max():
        return float("nan")
    score = outputs[:, -1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs[:, 0]
    second = labels == labels.max()
    n, ranks = int(second.sum()), rankdata(score)
    return float((ranks[second].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def accuracy(outputs: Array, labels: Array) -> float:
    """Share of rows whose largest output is that of the label."""
    return float((outputs.argmax(1) == labels).mean())


def spearman(outputs: Array, labels: Array) -> float:
    """Rank correlation of the one output with the labels; NaN where one of them is constant."""
    if np.ptp(outputs) == 0 or np.ptp(labels) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(outputs[:, 0]), rankdata(labels))[0, 1])


def choose_metric(outputs: int, labels: Array) -> tuple[str, Callable[[Array, Array], float]]:
    """Name and function (outputs (n, k), labels (n,)) of the metric that fits; InputError."""
    whole = bool((labels == labels.round()).all())
    classes = len(np.unique(labels))
    if whole and classes == 2 and outputs in (1, 2):
        return "AUROC", auroc
    if whole and outputs > 1 and labels.min() >= 0 and labels.max() < outputs:
        return "accuracy", accuracy
    if outputs == 1 and classes > 2:
        return "Spearman", spearman
    raise InputError(
        f"labels that fit a head of {outputs} outputs required, got {classes} distinct values from"
        f" {labels.min():g} to {labels.max():g}; classes must be 0 to {outputs - 1},"
        " numbers need a head of one output"
    )


def task_change(before: Tensor, after: Tensor, labels: Array, seed: int = 0) -> TaskChange:
    """Metric of a head's outputs (n, k) before and after, paired over bootstrap draws of rows."""
    name, metric = choose_metric(before.shape[1], labels)
    pair = [t.detach().double().cpu().numpy() for t in (before, after)]
    source = generator(seed, "bootstrap over labels")
    rows = torch.randint(len(labels), (DRAWS, len(labels)), generator=source).numpy()
    draws = np.array([[metric(output[r], labels[r]) for output in pair] for r in rows])
    draws = draws[np.isfinite(draws).all(1)]
    values = [metric(output, labels) for output in pair]
    if not np.isfinite(values).all() or not len(draws):
        raise InputError(
            f"held-out labels and outputs of more than one value required for {name}, got one;"
            " give more rows"
        )
    old, new = (interval(v, *percentile_interval(draws[:, i]), True) for i, v in enumerate(values))
    low, high = percentile_interval(draws[:, 1] - draws[:, 0])
    change = interval(values[1] - values[0], low, high, True)
    return TaskChange(name, len(labels), old, new, change)
