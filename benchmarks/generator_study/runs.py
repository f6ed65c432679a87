"""The single runs of a study: functions of their settings, kept as JSON, never made twice."""

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from distil_rank.core import resume
from distil_rank.core.errors import at_least
from distil_rank.core.records import Record, sha256
from distil_rank.generators.calibration import calibration
from distil_rank.generators.inherit import initial_student
from distil_rank.generators.loss import Objective
from distil_rank.generators.metrics import (
    Scores,
    bits_per_residue,
    divergence_from_teacher,
    perplexity,
    perplexity_ratio,
    score,
)
from distil_rank.generators.models import (
    load,
    parameters,
    require_same_vocabulary,
    weights_sha256,
)
from distil_rank.generators.prepared import PARTS, Prepared
from distil_rank.generators.teachers import Cache, Live
from distil_rank.generators.train import Schedule, fit, mean_nll

SCHEMA = "distil-rank/generator-run/1"


@dataclass(frozen=True)
class Material:
    """The data and the teacher that all runs of a study share."""

    teacher: str
    data: str  # folder that `generator prepare` made
    cache: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """One student: its shape, objective and schedule (whose seed is also that of its weights)."""

    shape: tuple[int, int, int]
    objective: Objective
    schedule: Schedule
    init: str = "random"
    pilot: bool = False  # made for a choice: judged on validation proteins only


class Bench:
    """Everything loaded once per process: proteins, teacher, its targets and its test scores."""

    def __init__(self, material: Material):
        self.material = material
        self.teacher, self.tokenizer = load(material.teacher)
        self.teacher.to(material.device)
        self.prepared = Prepared(material.data)
        require_same_vocabulary(self.tokenizer, self.prepared.tokenizer)
        self.train, self.validation = self.prepared.training_parts(self.teacher)
        self.test = self.prepared.part("test")
        self.source: Any = Cache(self.teacher, self.train) if material.cache else Live(self.teacher)
        self.test_targets = Cache(self.teacher, self.test) if material.cache else Live(self.teacher)

    @cached_property
    def teacher_scores(self) -> Scores:
        return score(self.teacher, self.test, scaling=False)

    def student(self, run: Run) -> tuple[Any, list[dict[str, float]]]:
        """A trained student and its log."""
        student = initial_student(self.teacher, *run.shape, run.init, run.schedule.seed)
        student.to(self.material.device)
        log: list[dict[str, float]] = []
        fit(student, self.train, None, self.source, run.objective, run.schedule, report=log.append)
        return student, log

    def outcome(self, run: Run) -> Record:
        """What a run is judged by: validation for choices, and all of it on test for claims."""
        student, log = self.student(run)
        chosen_by = {
            "schema": SCHEMA,
            "run": describe(run),
            "validation_nll": mean_nll(student, self.validation),
        }
        if run.pilot:
            return chosen_by
        found = score(student, self.test, self.test_targets, scaling=False)
        measured = calibration(found.confidence, found.correct, found.brier, found.protein)
        every = max(1, len(log) // 40)
        return chosen_by | {
            "parameters": parameters(student),
            "weights_sha256": weights_sha256(student),
            "perplexity": perplexity(found),
            "log_perplexity": float(found.nll.sum() / found.predictions.sum()),
            "bits_per_residue": bits_per_residue(found),
            "ratio": perplexity_ratio(found, self.teacher_scores),
            "kl_to_teacher": divergence_from_teacher(found),
            "calibration_error": measured["error"],
            "signed_gap": measured["signed_gap"],
            "curve": [[entry["step"], entry["loss"]] for entry in log[::every]],
        }


def describe(run: Run) -> Record:
    return {
        "shape": list(run.shape),
        "objective": asdict(run.objective),
        "schedule": asdict(run.schedule),
        "init": run.init,
        "pilot": run.pilot,
    }


@cache
def content(path: str) -> str:
    """Hash of prepared proteins, or of the weights in a folder; a name on the hub is itself."""
    if (Path(path) / "data.json").is_file():
        prepared = Prepared(path)
        return "".join(prepared.part(part).sha256 for part in PARTS)
    file = Path(path) / "model.safetensors"
    return sha256(file) if file.is_file() else path


def request(run: Run, material: Material) -> list[Any]:
    """Everything that changes what a run comes to: its settings, the data, the teacher's weights.

    Not the cache or the device.
    """
    contents = {"teacher": content(material.teacher), "data": content(material.data)}
    return [describe(run), asdict(material) | contents | {"cache": True, "device": "cpu"}]


def make(
    runs: Sequence[Run], material: Material, work: Path, workers: int, bench: Bench | None = None
) -> list[Record]:
    """Outcomes of the runs, in order; those in `work` are read, the others made and kept.

    `workers` processes make them.
    """
    at_least(1, workers=workers)
    results = resume.Cache(work)
    requests = [request(run, material) for run in runs]
    missing = [i for i, r in enumerate(requests) if not results.path("run", r).is_file()]
    if missing and sys.stderr.isatty():
        print(f"{len(missing)} of {len(runs)} runs to make", file=sys.stderr)
    if missing and bench is None:
        bench = Bench(material)
    if missing and bench and workers > 1:
        make_in_processes([runs[i] for i in missing], material, work, workers, bench)
    makers = [partial(bench.outcome, run) if bench else dict for run in runs]
    return [results.json("run", r, m) for r, m in zip(requests, makers)]


def make_in_processes(
    runs: Sequence[Run], material: Material, work: Path, workers: int, bench: Bench
) -> None:
    """Make and keep runs in several processes."""
    import multiprocessing

    # a forked process shares what is loaded; a GPU does not survive a fork, some systems have none
    forks = material.device == "cpu" and "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    if forks and not all(run.pilot for run in runs):
        _ = bench.teacher_scores  # once, here, and not in every process
    given = (material, bench if forks else None)
    with ProcessPoolExecutor(min(workers, len(runs)), context, _open_bench, given) as pool:
        list(pool.map(_make_one, runs, repeat(material), repeat(work)))


_bench: Bench | None = None


def _open_bench(material: Material, bench: Bench | None) -> None:
    global _bench
    import torch

    torch.set_num_threads(1)  # of this worker process
    _bench = bench or Bench(material)


def _make_one(run: Run, material: Material, work: Path) -> None:
    assert _bench is not None
    outcome = _bench.outcome
    resume.Cache(work).json("run", request(run, material), lambda: outcome(run))


def uncertainty_examples(bench: Bench, count: int = 6) -> list[Record]:
    """Entropies and weights along some test proteins, for the heat map."""
    import torch

    from distil_rank.generators.loss import entropy, position_weights, predictions

    lengths = bench.test.lengths
    middle = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[:count]
    tokens, mask = bench.test.batch(middle)
    with torch.no_grad():
        logits = bench.teacher(
            input_ids=tokens.to(bench.material.device), use_cache=False
        ).logits.cpu()
    entropies = entropy(logits.flatten(0, 1)).view(tokens.shape)[:, :-1]
    counted = predictions(mask)
    residues = counted & ~torch.isin(tokens[:, 1:], torch.tensor(bench.test.layout))
    weights = position_weights(entropies, counted, residues=residues)
    return [
        {"entropy": entropies[i][counted[i]].tolist(), "weight": weights[i][counted[i]].tolist()}
        for i in range(len(middle))
    ]
