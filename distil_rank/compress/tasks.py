"""What a head is for: labels, the metric that fits them, and its change with a paired 95 % interval.

| labels | metric |
|---|---|
| two classes | AUROC |
| more classes (integers, as many as the head has outputs) | accuracy |
| numbers | Spearman correlation |
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator
from distil_rank.core.records import interval
from distil_rank.core.intervals import percentile_interval

DRAWS = 1000
Metric = Callable[[NDArray, NDArray], float]  # outputs (n, k), labels (n,)


def load_labels(path: str | Path, rows: int) -> NDArray[np.float64]:
    """One number a row from .npy, .npz (key y), .pt or .csv (one column, or one named label); InputError."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            labels = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            labels = np.load(path, allow_pickle=False)["y"]
        elif path.suffix == ".pt":
            labels = torch.load(path, weights_only=True).numpy()
        elif path.suffix == ".csv":
            with path.open() as file:
                table = list(csv.reader(file))
            column = table[0].index("label") if "label" in table[0] else 0
            labels = np.array([row[column] for row in (table[1:] if "label" in table[0] else table)], dtype=np.float64)
        else:
            raise InputError(f"labels in .npy, .npz, .pt or .csv required, got {path}")
        labels = np.asarray(labels, dtype=np.float64)
    except InputError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"readable labels, one number a row, required in {path}, got: {reason}") from None
    if labels.shape != (rows,) or not np.isfinite(labels).all():
        raise InputError(
            f"{rows} finite labels, one for each row of data, required in {path}, got shape {labels.shape}"
        )
    return labels


def auroc(outputs: NDArray, labels: NDArray) -> float:
    """Area under the ROC curve of the second class; ties count half."""
    score = outputs[:, -1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs[:, 0]
    positive = labels == labels.max()
    count = int(positive.sum())
    if count in (0, len(labels)) or labels.min() == labels.max():
        return float("nan")
    ranks = scipy.stats.rankdata(score)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(labels) - count)))


def accuracy(outputs: NDArray, labels: NDArray) -> float:
    return float((outputs.argmax(1) == labels).mean())


def spearman(outputs: NDArray, labels: NDArray) -> float:
    with np.errstate(invalid="ignore"):
        a, b = scipy.stats.rankdata(outputs[:, 0]), scipy.stats.rankdata(labels)
        return float(np.corrcoef(a, b)[0, 1])


def choose_metric(outputs: int, labels: NDArray) -> tuple[str, Metric]:
    """Metric name and function for a head of so many outputs and these labels; InputError where they do not fit."""
    whole = bool((labels == labels.round()).all())
    classes = len(np.unique(labels))
    if whole and classes == 2 and outputs in (1, 2):
        return "AUROC", auroc
    if whole and outputs > 1 and labels.min() >= 0 and labels.max() < outputs:
        return "accuracy", accuracy
    if outputs == 1 and classes > 2:
        return "Spearman", spearman
    raise InputError(
        f"labels that fit a head of {outputs} outputs required, got {classes} distinct values from {labels.min():g} to "
        f"{labels.max():g}; classes must be 0 to {outputs - 1}, numbers need a head of one output"
    )


def task_change(before: Tensor, after: Tensor, labels: NDArray, seed: int = 0) -> dict[str, Any]:
    """Metric of the head's outputs (n, k) before and after, and after - before, over paired bootstrap draws of the rows."""
    name, metric = choose_metric(before.shape[1], labels)
    pair = [t.detach().double().cpu().numpy() for t in (before, after)]
    rows = torch.randint(len(labels), (DRAWS, len(labels)), generator=generator(seed, "bootstrap over labels")).numpy()
    draws = np.array([[metric(output[r], labels[r]) for output in pair] for r in rows])
    draws = draws[np.isfinite(draws).all(1)]
    values = [metric(output, labels) for output in pair]
    if not np.isfinite(values).all() or not len(draws):
        raise InputError(f"held-out labels of more than one value required for {name}, got one; give more rows")
    record = {
        label: interval(value, *percentile_interval(draws[:, i]), True)
        for i, (label, value) in enumerate(zip(("before", "after"), values))
    }
    change = interval(values[1] - values[0], *percentile_interval(draws[:, 1] - draws[:, 0]), True)
    return {"metric": name, "rows": len(labels), **record, "change": change}
