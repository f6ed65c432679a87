"""Evaluate a student beside its teacher on held-out proteins.

    distil-rank generator evaluate --student models/tiny --teacher nferruz/ProtGPT2 \\
        --data shards --part test --out tiny.json
    distil-rank generator evaluate --student models/tiny --teacher nferruz/ProtGPT2 \\
        --data heldout --out tiny.json    # heldout: prepared from a FASTA with --held-out 0

Likelihood, calibration, what either writes, speed. `--part test` is refused unless the student's
training left these very proteins out; where that is not on record of the teacher, or of the model
that a fine-tuning started from, a note and `left_out` say so. `--part all` takes every protein of
the folder, also those that a model was trained on. Below 1,000 proteins the result says
underpowered.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError, at_least
from distil_rank.core.records import config_record, environment, require_writable, write_json
from distil_rank.generators.command_prepare import clean
from distil_rank.generators.data import joined
from distil_rank.generators.evaluate import NEAREST_OF, Bed, compare
from distil_rank.generators.folding import load_esmfold
from distil_rank.generators.models import Dtype, load, require_same_vocabulary
from distil_rank.generators.prepared import PARTS, Prepared

SCHEMA = "distil-rank/generator-evaluation/3"


@dataclass(frozen=True)
class Config:
    student: str  # a generator by folder or name on the Hugging Face hub
    teacher: str  # a generator by folder or name on the Hugging Face hub
    data: Path  # folder that `generator prepare` made
    out: Path  # where to write
    part: Literal["all", "test", "hard"] = "all"  # every protein, or those kept aside for tests
    generate: int = 200  # proteins written by either model
    # FASTA of a family: whether its profile HMM finds what is written (needs pyhmmer)
    family_fasta: Path | None = None
    # an ESMFold by folder or name (facebook/esmfold_v1): whether what is written folds, mean pLDDT
    esmfold: str | None = None
    dtype: Dtype = "float32"  # arithmetic
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    at_least(0, generate=config.generate)
    if not config.generate and (config.family_fasta or config.esmfold):
        raise InputError(
            "--generate above 0 required for --family-fasta and --esmfold, which are about what is"
            " written, got 0; raise it or leave them out"
        )
    if config.out.is_dir():
        raise InputError(f"a file to write required, got the folder {config.out}; add tiny.json")
    device = pick_device(config.device)
    require_writable(config.out.parent)
    prepared = Prepared(config.data)
    doubted = doubts(prepared, config)
    student, tokenizer = load(config.student)
    teacher, teacher_tokenizer = load(config.teacher)
    for model, other in ((teacher, teacher_tokenizer), (student, prepared.tokenizer)):
        require_same_vocabulary(other, tokenizer)
        prepared.require(model)
    parts = PARTS if config.part == "all" else (config.part,)
    natural = [sequence for part in parts for sequence in prepared.sequences(part)]
    if len(natural) < 2:
        raise InputError(f"at least two proteins required in {config.data}, got {len(natural)}")
    bed = Bed(
        tokenizer,
        joined([prepared.part(part) for part in parts]),
        natural,
        prepared.sequences("train", NEAREST_OF) if config.part != "all" else [],
        config.generate,
        config.seed,
        config.dtype,
        list(clean(config.family_fasta)) if config.family_fasta else (),
        load_esmfold(config.esmfold, device) if config.esmfold else None,
    )
    record = compare(student.to(device), teacher.to(device), bed)
    write_json(
        config.out,
        {
            "schema": SCHEMA,
            "config": config_record(config),
            "data": prepared.summary(),
            "seeds": [config.seed],
            "left_out": {name: not reasons for name, reasons in doubted.items()},
            **record,
            "environment": environment(device),
            "machine_dependent": ["speed"],
        },
    )
    for model, reason in (doubted["student"] | doubted["teacher"]).items():
        print(f"note: {model} {reason}; what it knows may be memory", file=sys.stderr)
    ratio = record["ratio"]
    power = " (underpowered)" if record["underpowered"] else ""
    interval = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    print(f"{config.out}: perplexity ratio {interval}{power}")


def doubts(prepared: Prepared, config: Config) -> dict[str, dict[str, str]]:
    """Why it is not on record that student and teacher never saw these proteins: {} where it is."""
    models = {"student": config.student, "teacher": config.teacher}
    if config.part == "all":
        return {
            name: {model: "may have been trained on --part all"} for name, model in models.items()
        }
    found = {name: prepared.doubts(model) for name, model in models.items()}
    if reason := found["student"].get(config.student):
        raise InputError(
            f"test proteins that {config.student} was trained without required in {config.data},"
            f" but it {reason}; prepare the same file with --split-by, its split.json, or measure"
            " other proteins with --part all"
        )
    return found
