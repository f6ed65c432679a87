"""The single runs of a study: each is a function of its settings, is kept as JSON, and is never made twice."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distil_rank.core.errors import InputError
from distil_rank.generators.calibration import calibration
from distil_rank.generators.data import encode, prepare, read_sequences
from distil_rank.generators.fit import Schedule, fit, mean_nll
from distil_rank.generators.inherit import initial_student
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import load, parameters, weights_sha256
from distil_rank.generators.scores import (
    Scores,
    bits_per_residue,
    divergence_from_teacher,
    perplexity,
    perplexity_ratio,
    score,
)
from distil_rank.generators.teachers import Cache, Live
from distil_rank.core.records import write_json

SCHEMA = "distil-rank/generator-run/1"


@dataclass(frozen=True)
class Material:
    """The data and the teacher that all runs of a study share."""

    teacher: str
    data: str
    train_size_prop: float
    held_out: float
    max_residues: int
    seed: int = 0
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
    """Everything loaded once per process: proteins, teacher, its targets and its scores on the test proteins."""

    def __init__(self, material: Material):
        self.material = material
        self.teacher, self.tokenizer = load(material.teacher)
        self.teacher.to(material.device)
        sequences = read_sequences(material.data)
        self.splits = prepare(
            sequences, material.train_size_prop, material.held_out, material.seed, material.max_residues
        )
        context = self.teacher.config.n_positions
        parts = (self.splits.train, self.splits.validation, self.splits.test)
        self.train, self.validation, self.test = (encode(part, self.tokenizer, context) for part in parts)
        self.source: Any = Cache(self.teacher, self.train) if material.cache else Live(self.teacher)
        self.test_targets = Cache(self.teacher, self.test) if material.cache else Live(self.teacher)

    @cached_property
    def teacher_scores(self) -> Scores:
        return score(self.teacher, self.test, scaling=False)

    def student(self, run: Run) -> Any:
        """A trained student and its log."""
        student = initial_student(self.teacher, *run.shape, run.init, run.schedule.seed).to(self.material.device)
        log: list[dict[str, float]] = []
        fit(student, self.train, None, self.source, run.objective, run.schedule, report=log.append)
        return student, log

    def outcome(self, run: Run) -> dict[str, Any]:
        """What a run is judged by: likelihood on validation (for choices) and all of it on test (for claims)."""
        student, log = self.student(run)
        chosen_by = {"schema": SCHEMA, "run": describe(run), "validation_nll": mean_nll(student, self.validation)}
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
            "ece": measured["ece"],
            "noise_floor": measured["noise_floor"],
            "ece_debiased": measured["ece_debiased"],
            "signed_gap": measured["signed_gap"],
            "curve": [[entry["step"], entry["loss"]] for entry in log[::every]],
        }


def describe(run: Run) -> dict[str, Any]:
    return {
        "shape": list(run.shape),
        "objective": asdict(run.objective),
        "schedule": asdict(run.schedule),
        "init": run.init,
        "pilot": run.pilot,
    }


def key(run: Run, material: Material) -> str:
    """Name of a run's file: changes with its settings, the data and the teacher's weights, not with the cache."""
    weights = Path(material.teacher) / "model.safetensors"
    content = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else material.teacher
    shared = asdict(replace(material, cache=True, device="cpu", teacher="", data=Path(material.data).name))
    text = json.dumps([describe(run), shared, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make(
    runs: Sequence[Run], material: Material, work: Path, workers: int, bench: Bench | None = None
) -> list[dict[str, Any]]:
    """Outcomes of the runs, in order; those in `work` are read, the others made (by `workers` processes) and kept."""
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    work.mkdir(parents=True, exist_ok=True)
    paths = [work / f"{key(run, material)}.json" for run in runs]
    missing = {path: run for path, run in zip(paths, runs, strict=True) if not path.exists()}
    if missing and sys.stderr.isatty():
        print(f"{len(missing)} of {len(runs)} runs to make", file=sys.stderr)
    if missing:
        bench = bench or Bench(material)
    if missing and workers == 1:
        assert bench is not None
        for path, run in missing.items():
            write_json(path, bench.outcome(run))
    elif missing:
        import multiprocessing

        # a forked process shares what is loaded; a GPU does not survive a fork, and some systems have none
        forks = material.device == "cpu" and "fork" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if forks else "spawn")
        if forks and bench is not None and not all(run.pilot for run in missing.values()):
            _ = bench.teacher_scores  # once, here, and not in every process
        given = (material, bench if forks else None)
        with ProcessPoolExecutor(min(workers, len(missing)), context, _open_bench, given) as pool:
            list(pool.map(_make_one, missing.values(), [str(path) for path in missing]))
    return [json.loads(path.read_text()) for path in paths]


_bench: Bench | None = None


def _open_bench(material: Material, bench: Bench | None) -> None:
    global _bench
    import torch

    torch.set_num_threads(1)  # of this worker process
    _bench = bench or Bench(material)


def _make_one(run: Run, path: str) -> None:
    assert _bench is not None
    write_json(path, _bench.outcome(run))


def uncertainty_examples(bench: Bench, count: int = 6) -> list[dict[str, Any]]:
    """Entropies and weights along some test proteins, for the heat map."""
    import torch

    from distil_rank.generators.loss import entropy, position_weights, predictions

    lengths = bench.test.lengths
    middle = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[:count]
    tokens, mask = bench.test.batch(middle)
    with torch.no_grad():
        logits = bench.teacher(input_ids=tokens.to(bench.material.device), use_cache=False).logits.cpu()
    entropies = entropy(logits.flatten(0, 1)).view(tokens.shape)[:, :-1]
    counted = predictions(mask)
    weights = position_weights(entropies, counted)
    return [
        {"entropy": entropies[i][counted[i]].tolist(), "weight": weights[i][counted[i]].tolist()}
        for i in range(len(middle))
    ]
