"""A student beside its teacher on held-out proteins: likelihood, calibration, writing, speed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch

from distil_rank.core.records import Metric, Record
from distil_rank.generators import metrics, quality
from distil_rank.generators.calibration import calibration
from distil_rank.generators.data import Encoded
from distil_rank.generators.folding import confidence
from distil_rank.generators.models import Dtype, parameters, weights_sha256
from distil_rank.generators.sample import Sampler, draw
from distil_rank.generators.teachers import Live

ENOUGH = 1000  # proteins
NEAREST_OF = 5000  # training proteins that novelty is measured against, at most
BATCHES, TOKENS, ROUNDS = (1, 8, 32), 64, 3  # of the measurement of speed


@dataclass(frozen=True)
class Bed:
    """What models are measured on, and how."""

    tokenizer: Any
    held_out: Encoded  # the test proteins
    natural: Sequence[str]  # the same as sequences
    training: Sequence[str]  # proteins that novelty is measured against
    generate: int = 200
    seed: int = 0
    dtype: Dtype = "float32"
    family: Sequence[str] = ()  # of which an HMM is made
    esmfold: Any = None  # on its device


class Measured(TypedDict):
    """What is known of one model."""

    weights_sha256: str
    parameters: dict[str, int]
    shape: dict[str, int]
    perplexity: Metric
    bits_per_residue: Metric
    calibration: Record
    generation: NotRequired[quality.Writing]


class Comparison(TypedDict):
    """A student beside its teacher."""

    underpowered: bool
    proteins: int
    student: Measured
    teacher: Measured
    ratio: Metric
    kl_to_teacher: Metric
    compression: dict[str, float]
    speed: Record


def measure(model: Any, bed: Bed, teacher: Any = None) -> tuple[Measured, metrics.Scores]:
    """A model's own record, and its scores; with the divergence from `teacher` where given."""
    targets = None if teacher is None else Live(teacher, bed.dtype)
    found = metrics.score(model, bed.held_out, targets, dtype=bed.dtype)
    shape = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    record = Measured(
        weights_sha256=weights_sha256(model),
        parameters=parameters(model),
        shape={name: getattr(model.config, name) for name in shape},
        perplexity=metrics.perplexity(found),
        bits_per_residue=metrics.bits_per_residue(found),
        calibration=calibration(found.confidence, found.correct, found.protein, bed.seed),
    )
    if bed.generate:
        record["generation"] = writing(model, bed)
    return record, found


def writing(model: Any, bed: Bed) -> quality.Writing:
    """What the proteins that a model writes are like."""
    sampler = Sampler(model.config.n_positions - 1)
    drawn = list(draw(model, bed.tokenizer, range(bed.generate), sampler, bed.seed))
    texts, ended = [d.sequence for d in drawn], [d.ended for d in drawn]
    record = quality.describe(texts, ended, bed.natural, bed.training, bed.seed, bed.family)
    if bed.esmfold is not None:
        rng = np.random.default_rng([bed.seed, 24])
        natural = quality.length_matched([len(text) for text in texts], bed.natural, rng)
        record["plddt"] = confidence(bed.esmfold, texts, natural, bed.seed)
    return record


def compare(
    student: Any,
    teacher: Any,
    bed: Bed,
    known: tuple[Measured, metrics.Scores] | None = None,
) -> Comparison:
    """All metrics of a student beside its teacher; `known` is what `measure` found for it."""
    own_record, own = measure(student, bed, teacher)
    its_record, its = known or measure(teacher, bed)
    large, small = its_record["parameters"], own_record["parameters"]
    return Comparison(
        underpowered=len(bed.natural) < ENOUGH,
        proteins=len(bed.natural),
        student=own_record,
        teacher=its_record,
        ratio=metrics.perplexity_ratio(own, its),
        kl_to_teacher=metrics.divergence_from_teacher(own),
        compression={name: large[name] / max(1, small[name]) for name in large},
        speed=writing_speed({"student": student, "teacher": teacher}),
    )


def writing_speed(models: dict[str, Any]) -> Record:
    """Tokens per second of greedy writing with a cache, a batch size each.

    Medians of interleaved rounds, to be read as ratios.
    """
    found: dict[str, Record] = {name: {} for name in models}
    for size in BATCHES:
        rounds = [[_seconds(m, size) for m in models.values()] for _ in range(ROUNDS + 1)]
        for name, middle in zip(models, np.median(rounds[1:], 0)):  # the first round warms up
            found[name][str(size)] = {"tokens_per_second": size * TOKENS / middle}
    return {"tokens_per_sequence": TOKENS, "repeats": ROUNDS, "models": found}


def _seconds(model: Any, size: int) -> float:
    start = time.perf_counter()
    given = torch.full((size, 1), model.config.eos_token_id, device=model.device)
    how = {"attention_mask": torch.ones_like(given), "do_sample": False}
    length = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    model.generate(given, pad_token_id=model.config.eos_token_id, **how, **length).cpu()
    return time.perf_counter() - start
