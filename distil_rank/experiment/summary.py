"""What the experiment's two JSON files hold beside the measurements."""

from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.core.latency import compare_latency, parameters
from distil_rank.core.linear import LowRankLinear, linear
from distil_rank.core.lowrank import smallest_rank
from distil_rank.core.records import Record, config_record, environment

TIMED = ("latency", "latency_teacher_ms", "latency_student_ms", "speedup")
# the layer of the published claim: 1280 x 1280 at rank 64, 7.5 times faster
CLAIM: tuple[int, ...] = (1280, 1280)
CLAIM_RANK, CLAIMED_SPEEDUP = 64, 7.5
ROWS_A_RANK = 5  # held-out rows for each rank, below which the floor says little


def claim(batches: list[int], rounds: int, device: torch.device) -> Record:
    """Latency for the shape of the claim, and what calls cost that have nothing to compute."""

    def pair(d_out: int, d_in: int, rank: int) -> tuple[nn.Module, nn.Module]:
        A, B = torch.ones(rank, d_in, device=device), torch.ones(d_out, rank, device=device)
        bias = torch.ones(d_out, device=device)
        return linear(torch.ones(d_out, d_in, device=device), bias), LowRankLinear(A, B, bias)

    teacher, student = pair(CLAIM[0], CLAIM[1], CLAIM_RANK)
    inputs = [torch.ones(n, CLAIM[1], device=device) for n in batches]
    rows = compare_latency(teacher, student, inputs, rounds)
    calls = compare_latency(*pair(1, 1, 1), [inputs[0][:1, :1]], rounds)[0]
    sizes = parameters(teacher), parameters(student)
    return {
        "shape": list(CLAIM),
        "rank": CLAIM_RANK,
        "published_speedup": CLAIMED_SPEEDUP,
        "params_teacher": sizes[0],
        "params_student": sizes[1],
        "compression": sizes[0] / sizes[1],
        "latency": rows,
        "empty_calls": {key: calls[key] for key in ("teacher_ms", "student_ms")},  # type: ignore[literal-required]
    }


def notices(head: Record, teachers: Record) -> list[str]:
    """What a reader must know before any figure: terminal, JSON, documents and figure show it."""
    found, data, rank = [], head["data"], head["target_rank"]
    if not head["real_data"]:
        found.append("SYNTHETIC embeddings: no figure here is about real proteins")
    if data.get("shared_rows"):
        shared = f"{data['shared_rows']} of {data['n_val']} held-out rows"
        found.append(f"{shared} are also training rows: held-out figures flatter")
    if data["n_val"] < ROWS_A_RANK * rank:
        few = f"{data['n_val']} held-out rows, fewer than {ROWS_A_RANK} x rank {rank}"
        found.append(f"{few}: the floor is far below what any student can reach")
    for known in teachers.values():
        task = known["task"]
        if not task["trained"]:
            share = f"{max(task['mse_per_seed']) / task['constant_mse']:.0%} of a constant's"
            found.append(f"the denoiser is NOT trained: its error on its task is {share}")
    return found


def bracket(optimum: Record) -> Record:
    """What the best student of this rank loses on all rows of this kind: between these two FVU.

    The floor of the training rows is too low, because the factors were chosen on them; the held-out
    loss of the optimum is too high, because they were chosen on other rows.
    """
    low = sum(optimum["train_fvu"]) / len(optimum["train_fvu"])
    return {"low": low, "high": optimum["fvu"]["value"], "higher_is_better": False}


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


def header(data: Record, x: Tensor, x_val: Tensor, rank: int, teachers: Record) -> Record:
    """What was compared, of both files: rows x (n, d), what is known of them, and the rank."""
    head = {
        "real_data": data["files"] is not None,
        "target_rank": rank,
        "input_dim": x.shape[1],
        "data": data | {"n_train": len(x), "n_val": len(x_val), "dim": x.shape[1]},
    }
    return head | {"notices": notices(head, teachers)}


def passport(config: Any, recipes: Record, device: torch.device) -> Record:
    """How the summary was made, and which of its values may differ on another machine."""
    return {
        "config": config_record(config),
        "recipes": recipes,
        "environment": environment(device),
        "machine_dependent": ["environment", "claim", *(f"experiments.*.{key}" for key in TIMED)],
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
