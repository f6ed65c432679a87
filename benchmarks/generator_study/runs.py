"""The single runs: a student trained and scored, kept as JSON by what it depends on."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record
from distil_rank.core.resume import Cache as Results
from distil_rank.generators.calibration import calibration
from distil_rank.generators.data import Encoded, joined
from distil_rank.generators.loss import Objective
from distil_rank.generators.metrics import Scores, score
from distil_rank.generators.models import (
    initial_student,
    load,
    parameters,
    require_same_vocabulary,
    weights_sha256,
)
from distil_rank.generators.prepared import Prepared
from distil_rank.generators.teachers import Cache, Live
from distil_rank.generators.train import Schedule, fit, mean_nll

SCHEMA = "distil-rank/generator-run/2"
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Run:
    """One student; the seed of its schedule is also that of its weights."""

    shape: tuple[int, int, int]
    objective: Objective
    schedule: Schedule
    init: str = "random"
    pilot: bool = False  # made for a choice: judged on validation proteins only


class Bench:
    """Everything that runs share: proteins, teacher, its targets and its scores."""

    def __init__(self, teacher: str, data: Path, most: int, device: str, cache: bool = True):
        self.device = device
        self.teacher, self.tokenizer = load(teacher)
        self.teacher.to(device)
        self.prepared = Prepared(data)
        require_same_vocabulary(self.tokenizer, self.prepared.tokenizer)
        self.train, _ = self.prepared.training_parts(self.teacher)
        held_out = ("validation", "test", "hard")
        self.validation, self.test, hard = (sample(self.prepared.part(p), most) for p in held_out)
        if len(self.test) < 3:
            raise InputError(f"three test proteins required in {data}, got {len(self.test)}")
        self.measured = joined([self.test, hard])
        self.source: Any = Cache(self.teacher, self.train) if cache else Live(self.teacher)
        self.scores = score(self.teacher, self.measured)
        self.strata = strata(self.scores, len(self.test))
        parts = (self.train, self.validation, self.measured)
        self.known = [weights_sha256(self.teacher), *(part.sha256 for part in parts)]

    def student(self, run: Run) -> Any:
        """A trained student."""
        student = initial_student(self.teacher, *run.shape, run.init, run.schedule.seed)
        fit(student.to(self.device), self.train, None, self.source, run.objective, run.schedule)
        return student

    def outcome(self, run: Run) -> Record:
        """What a run is judged by: validation for choices, and the test proteins for claims."""
        student = self.student(run)
        found: Record = {
            "schema": SCHEMA,
            "run": asdict(run),
            "validation_nll": mean_nll(student, self.validation),
        }
        if run.pilot:
            return found
        scores = score(student, self.measured)
        own = scores.protein < len(self.test)
        tokens = scores.confidence[own], scores.correct[own], scores.protein[own]
        measured = calibration(*tokens)
        return found | {
            "parameters": parameters(student),
            "log_perplexity": by_stratum(scores.nll, scores.predictions, self.strata),
            "calibration_error": measured["error"]["value"],
        }

    def request(self, run: Run) -> list[Any]:
        """All that changes what a run comes to: not the cache, the device or the processes."""
        return [SCHEMA, asdict(run), self.known, len(self.test)]


def sample(part: Encoded, most: int) -> Encoded:
    """At most so many proteins, drawn at random."""
    order = np.random.default_rng(4).permutation(len(part))[:most]
    return part.take(np.sort(order)) if len(part) > most else part


def strata(scores: Scores, n_test: int) -> dict[str, Mask]:
    """Test proteins, their thirds by the teacher's perplexity, and the hard part."""
    place, known = np.arange(len(scores.nll)), scores.nll / scores.predictions
    thirds = np.array_split(known[:n_test].argsort(kind="stable"), 3)
    found = {"all": place < n_test}
    for name, part in zip(("easy", "middle", "difficult"), thirds):
        found[name] = np.isin(place, part)
    return found | ({"hard part": place >= n_test} if n_test < len(place) else {})


def by_stratum(nll: Any, predictions: Any, masks: dict[str, Mask]) -> dict[str, float]:
    """Mean negative log-likelihood per token among the proteins of each stratum."""
    return {name: float(nll[m].sum() / predictions[m].sum()) for name, m in masks.items()}


def make(runs: Sequence[Run], bench: Bench, work: Path, workers: int) -> list[Record]:
    """Outcomes of the runs, in order; those in `work` are read, the others made and kept."""
    results, requests = Results(work), {run: bench.request(run) for run in runs}

    def outcome(run: Run) -> Record:
        return results.json("run", requests[run], lambda: bench.outcome(run))

    missing = [run for run, known in requests.items() if not results.path("run", known).is_file()]
    print(f"{len(missing)} of {len(requests)} runs to make", file=sys.stderr)
    spread(outcome, sorted(missing, key=lambda run: run.shape, reverse=True), workers)
    return [outcome(run) for run in runs]


def spread(work: Callable[[Any], Any], items: Sequence[Any], workers: int) -> list[Any]:
    """work(item) of every item, the first ones first, in processes that share what is loaded."""
    import multiprocessing

    if workers == 1 or len(items) < 2:
        return [work(item) for item in items]
    global _work
    _work = work
    with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
        return pool.map(_call, items, chunksize=1)


_work: Callable[[Any], Any]


def _call(item: Any) -> Any:
    return _work(item)
