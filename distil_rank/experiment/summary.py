"""What the experiment's two JSON files hold beside the measurements."""

from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.core.latency import parameters
from distil_rank.core.lowrank import smallest_rank
from distil_rank.core.records import Record, config_record, environment

TIMED = ("latency", "latency_teacher_ms", "latency_student_ms", "speedup")


def familiar_keys(
    svd: Record, distilled: Record, latency: list[Any], teacher: nn.Module, student: nn.Module
) -> Record:
    """The keys that readers have always had: the student is the distilled one, times at batch 32.

    From the metrics of two students, the timings, and a teacher and a student to count.
    """
    timing = next(row for row in latency if row["batch"] == 32 and row["mode"] == "eager")
    svd_mse, mse = svd["relative_mse"]["value"], distilled["relative_mse"]["value"]
    svd_cosine, cosine = svd["cosine"]["value"], distilled["cosine"]["value"]
    return {
        "svd_cosine": svd_cosine,
        "svd_rel_mse": svd_mse,
        "student_cosine": cosine,
        "student_rel_mse": mse,
        "cosine_improvement": cosine - svd_cosine,
        "mse_reduction": 1 - mse / svd_mse,
        "latency_teacher_ms": timing["teacher_ms"]["median"],
        "latency_student_ms": timing["student_ms"]["median"],
        "speedup": timing["speedup"]["median"],
        "params_teacher": parameters(teacher),
        "params_student": parameters(student),
        "compression": parameters(teacher) / parameters(student),
    }


def header(data: Record, x: Tensor, x_val: Tensor, rank: int) -> Record:
    """What was compared, of both files: rows x (n, d), what is known of them, and the rank."""
    return {
        "real_data": data["files"] is not None,
        "target_rank": rank,
        "input_dim": x.shape[1],
        "data": data | {"n_train": len(x), "n_val": len(x_val), "dim": x.shape[1]},
    }


def passport(config: Any, recipes: Record, device: torch.device) -> Record:
    """How the summary was made, and which of its values may differ on another machine."""
    return {
        "config": config_record(config),
        "recipes": recipes,
        "environment": environment(device),
        "machine_dependent": ["environment", *(f"experiments.*.{key}" for key in TIMED)],
    }


def ranks_for(targets: tuple[float, ...], curves: dict[str, Tensor]) -> dict[str, dict[str, int]]:
    """The smallest rank that reaches each FVU, by curves (k + 1,) over the ranks."""
    kinds = ("train_fvu", "fvu", "floor_fvu")
    return {f"{t:.2f}": {kind: smallest_rank(curves[kind], t) for kind in kinds} for t in targets}


def plotted(curve: dict[str, Tensor], losses: dict[str, Tensor], weight: Tensor) -> Record:
    """What the figure shows of a teacher: curves over ranks, losses (seeds, steps), a spectrum."""
    return {
        "rank": {key: rounded(values) for key, values in curve.items()},
        "loss": {label: rounded(thinned(loss.mean(0))) for label, loss in losses.items()},
        "singular_values": rounded(torch.linalg.svdvals(weight)),
    }


def thinned(losses: Tensor, points: int = 100) -> Tensor:
    """The first value, then the mean of each of at most `points` stretches of a loss curve."""
    stretches = losses.tensor_split(min(points, len(losses)))
    return torch.cat([losses[:1], torch.stack([part.mean() for part in stretches])])


def rounded(values: Tensor) -> list[float]:
    """As many digits as a figure can show."""
    return [float(f"{value:.6g}") for value in values.tolist()]
