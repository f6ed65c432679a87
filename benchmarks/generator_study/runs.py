"""The single runs: a student trained and scored, kept as JSON by what it depends on."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distil_rank.core.errors import at_least
from distil_rank.core.records import Record, read_json
from distil_rank.core.resume import Cache as Results
from distil_rank.generators.data import Encoded, parse
from distil_rank.generators.inherit import initial_student
from distil_rank.generators.loss import Objective
from distil_rank.generators.metrics import Scores, calibration_of, score
from distil_rank.generators.models import (
    load,
    parameters,
    require_same_vocabulary,
    weights_sha256,
)
from distil_rank.generators.prepared import SPLIT, Prepared, digest
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
        self.train, validation = self.prepared.training_parts(self.teacher)
        self.validation, self.test = (
            sample(part, most) for part in (validation, self.prepared.part("test"))
        )
        texts = self.tokenizer.batch_decode([self.test.row(i) for i in range(len(self.test))])
        self.natural = [parse(text)[0] for text in texts]
        self.source: Any = Cache(self.teacher, self.train) if cache else Live(self.teacher)
        self.scores = score(self.teacher, self.test)
        self.strata = strata(self.scores, self.natural, Path(teacher) / "split.json")
        parts = (self.train, self.validation, self.test)
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
        scores = score(student, self.test)
        calibration = calibration_of(scores)
        return found | {
            "parameters": parameters(student),
            "log_perplexity": by_stratum(scores.nll, scores.predictions, self.strata),
            "calibration_error": calibration["error"]["value"],
            "signed_gap": calibration["signed_gap"]["value"],
        }

    def request(self, run: Run) -> list[Any]:
        """All that changes what a run comes to: not the cache, the device or the processes."""
        return [SCHEMA, asdict(run), self.known, [mask.tolist() for mask in self.strata.values()]]


def sample(part: Encoded, most: int) -> Encoded:
    """At most so many proteins, drawn at random."""
    order = np.random.default_rng(4).permutation(len(part))[:most]
    return part.take(np.sort(order)) if len(part) > most else part


def strata(scores: Scores, natural: Sequence[str], split: Path) -> dict[str, Mask]:
    """Test proteins by the teacher's perplexity, in thirds; and those far from all training ones.

    These are what the teacher's split.json lists as "far", where it does.
    """
    by_difficulty = (scores.nll / scores.predictions).argsort(kind="stable")
    found = {"all": np.ones(len(by_difficulty), bool)}
    for name, part in zip(("easy", "middle", "difficult"), np.array_split(by_difficulty, 3)):
        found[name] = np.isin(np.arange(len(by_difficulty)), part)
    listed = set(read_json(split, SPLIT).get("far", ())) if split.is_file() else set()
    far = np.array([digest(sequence) in listed for sequence in natural])
    return found | ({"far": far} if far.any() else {})


def by_stratum(nll: Any, predictions: Any, masks: dict[str, Mask]) -> dict[str, float]:
    """Mean negative log-likelihood per token among the proteins of each stratum."""
    return {name: float(nll[m].sum() / predictions[m].sum()) for name, m in masks.items()}


def make(runs: Sequence[Run], bench: Bench, work: Path, workers: int) -> list[Record]:
    """Outcomes of the runs, in order; those in `work` are read, the others made and kept."""
    at_least(1, workers=workers)
    results, requests = Results(work), {run: bench.request(run) for run in runs}
    missing = [run for run, known in requests.items() if not results.path("run", known).is_file()]
    print(f"{len(missing)} of {len(requests)} runs to make", file=sys.stderr)
    if workers > 1 and len(missing) > 1:
        import multiprocessing

        global _shared
        _shared = bench, results
        # forked processes share what is loaded; the longest runs first
        missing.sort(key=lambda run: run.shape, reverse=True)
        with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
            pool.map(_make_one, missing, chunksize=1)
    return [results.json("run", requests[run], lambda run=run: bench.outcome(run)) for run in runs]  # type: ignore[misc]


_shared: tuple[Bench, Results]


def _make_one(run: Run) -> None:
    bench, results = _shared
    results.json("run", bench.request(run), lambda: bench.outcome(run))
