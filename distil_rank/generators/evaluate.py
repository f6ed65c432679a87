"""Evaluate a student beside its teacher on held-out proteins: likelihood, calibration, what it writes, speed.

    distil-rank generator evaluate --student models/tiny --teacher nferruz/ProtGPT2 --data heldout.fasta --out tiny.json
    distil-rank generator evaluate --student models/nano-student --teacher models/nano-teacher \\
        --data proteins.fasta --part test --max-residues 248 --out nano.json

`--part test` takes the test part of the split that training makes with the same data, seed and limits; `--part all`
every protein of the file. Below 1,000 proteins the result says underpowered.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distil_rank.core.errors import InputError
from distil_rank.generators.fit import Precision
from distil_rank.generators.models import RATIO_THRESHOLDS
from distil_rank.core.records import config_record, environment, require_writable, sha256, shown_path, write_json

SCHEMA = "distil-rank/generator-evaluation/1"
ENOUGH = 1000  # proteins
NEXT_SHARES = (0.2, 0.5)  # train-size-prop to try when a size misses its threshold


@dataclass(frozen=True)
class Config:
    student: str  # folder of the student
    teacher: str  # folder or hub name of the teacher
    data: Path  # held-out proteins: FASTA, CSV, TSV or parquet
    out: Path  # JSON to write
    part: Literal["all", "test"] = "all"  # every protein of the file, or the test part of the training split
    training: Path | None = (
        None  # proteins that novelty is measured against; default: a sample of the training split, or none
    )
    held_out: float = 0.05  # share of the test part
    max_residues: int | None = None  # leave longer proteins out
    generate: int = 200  # proteins written by either model
    max_length: int = 0  # tokens per written protein; 0: the model's context
    seed: int = 0  # of the split and of what is written
    precision: Precision = "fp32"
    device: str = "auto"
    structures: bool = False  # fold what is written with ESMFold (needs its weights) and report pLDDT


def run(config: Config) -> None:
    from distil_rank.generators.data import encode, prepare, read_sequences
    from distil_rank.generators.models import load, require_same_vocabulary
    from distil_rank.generators.training import choose_device

    device = choose_device(config.device)
    require_writable(config.out.parent)
    student, tokenizer = load(config.student)
    teacher, teacher_tokenizer = load(config.teacher)
    require_same_vocabulary(teacher_tokenizer, tokenizer)
    sequences = read_sequences(config.data)
    if config.part == "test":
        splits = prepare(sequences, 1.0, config.held_out, config.seed, config.max_residues)
        natural, training, counts = splits.test, splits.train, dict(splits.counts)
    else:
        natural = [s for s in dict.fromkeys(sequences) if config.max_residues is None or len(s) <= config.max_residues]
        training, counts = [], {"read": len(sequences)}
    if config.training:
        training = read_sequences(config.training)
    if len(natural) < 2:
        raise InputError(f"at least two distinct proteins required in {config.data}, got {len(natural)}; give more")
    held_out = encode(natural, tokenizer, min(student.config.n_positions, teacher.config.n_positions))
    bed = Bed(
        tokenizer, held_out, natural, training, config.generate, config.max_length, config.seed, config.precision,
        config.structures,
    )  # fmt: skip
    record = compare(student.to(device), teacher.to(device), bed)
    write_json(
        config.out,
        {
            "schema": SCHEMA,
            "config": config_record(config),
            "data": {
                "source": shown_path(config.data),
                "sha256": sha256(config.data),
                **counts,
                "n_test": len(natural),
            },
            "seeds": [config.seed],
            **record,
            "environment": environment(device),
            "machine_dependent": ["speed"],
        },
    )
    ratio = record["ratio"]
    power = " (underpowered)" if record["underpowered"] else ""
    print(f"{config.out}: perplexity ratio {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]{power}")


@dataclass(frozen=True)
class Bed:
    """What models are measured on, and how."""

    tokenizer: Any
    held_out: Any  # the test proteins, encoded
    natural: Sequence[str]  # the same as sequences
    training: Sequence[str]  # proteins that novelty is measured against
    generate: int = 200
    max_length: int = 0
    seed: int = 0
    precision: Precision = "fp32"
    structures: bool = False


def measure(model: Any, bed: Bed, teacher: Any = None) -> tuple[dict[str, Any], Any]:
    """A model's own record, and its scores; with the divergence from `teacher` where one is given."""
    from distil_rank.generators import quality, scores
    from distil_rank.generators.models import parameters, weights_sha256
    from distil_rank.generators.sampling import Sampler, draw
    from distil_rank.generators.structure import fold
    from distil_rank.generators.teachers import Live

    say(f"scoring {len(bed.natural)} proteins")
    targets = None if teacher is None else Live(teacher, bed.precision)
    found = scores.score(model, bed.held_out, targets, precision=bed.precision)
    how = {"precision": bed.precision}
    record: dict[str, Any] = {
        "weights_sha256": weights_sha256(model),
        "parameters": parameters(model),
        "shape": {k: getattr(model.config, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")},
        "perplexity": scores.perplexity(found),
        "bits_per_residue": scores.bits_per_residue(found),
        "calibration": scores.calibration_with_control(model, bed.held_out, found, bed.seed, **how),
    }
    if bed.generate:
        say(f"writing {bed.generate} proteins")
        sampler = Sampler(bed.max_length or model.config.n_positions)
        written = list(draw(model, bed.tokenizer, range(bed.generate), sampler, bed.seed, 32, "float32"))
        texts, sample = [d.sequence for d in written], _sample(bed.training, 1000, bed.seed)
        record["generation"] = quality.describe(texts, [d.ended for d in written], bed.natural, sample, bed.seed)
        skipped = {"skipped": "not asked for (--structures)"}
        record["generation"]["structure"] = fold(texts) if bed.structures else skipped
    return record, found


def compare(
    student: Any, teacher: Any, bed: Bed, known: tuple[dict[str, Any], Any] | None = None, speed: bool = True
) -> dict[str, Any]:
    """All metrics of a student beside its teacher, as JSON values; `known` is what `measure` found for the teacher."""
    from distil_rank.generators import scores
    from distil_rank.generators.speed import writing_speed

    record: dict[str, Any] = {"underpowered": len(bed.natural) < ENOUGH, "proteins": len(bed.natural)}
    record["student"], own = measure(student, bed, teacher)
    record["teacher"], theirs = known or measure(teacher, bed)
    record["ratio"] = scores.perplexity_ratio(own, theirs)
    record["kl_to_teacher"] = scores.divergence_from_teacher(own)
    sizes = [record[name]["parameters"] for name in ("teacher", "student")]
    record["compression"] = {k: sizes[0][k] / max(1, sizes[1][k]) for k in ("total", "without_embeddings")}
    record["verdict"] = verdict(record["ratio"], size_name(record["student"]["shape"]))
    if speed:
        say("measuring speed")
        record["speed"] = writing_speed({"student": student, "teacher": teacher})
    return record


def verdict(ratio: dict[str, Any], size: str | None = None) -> dict[str, Any]:
    """Words computed from the ratio's value: excellent below 1.5, good below 2; and whether the size's threshold is
    met."""
    word = "excellent" if ratio["value"] < 1.5 else "good" if ratio["value"] < 2 else "poor"
    found: dict[str, Any] = {"word": word, "size": size, "threshold": RATIO_THRESHOLDS.get(size or "")}
    if found["threshold"] is not None:
        found["met"] = ratio["value"] < found["threshold"]
        found["certain"] = ratio["high"] < found["threshold"] or ratio["low"] >= found["threshold"]
        if not found["met"]:
            found["try_train_size_prop"] = list(NEXT_SHARES)
    return found


def size_name(shape: dict[str, int]) -> str | None:
    from distil_rank.generators.models import SIZES

    return next((n for n, s in SIZES.items() if s == (shape["n_layer"], shape["n_head"], shape["n_embd"])), None)


def _sample(sequences: Sequence[str], n: int, seed: int) -> list[str]:
    """At most n of them, for novelty: the nearest of a sample is farther than the nearest of all, so n is recorded."""
    if not sequences:
        return []
    rng = np.random.default_rng([seed, 4])
    return [sequences[i] for i in sorted(rng.permutation(len(sequences))[:n])]


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
