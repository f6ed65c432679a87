"""Evaluate a student beside its teacher on held-out proteins.

    distil-rank generator evaluate --student models/tiny --teacher nferruz/ProtGPT2 \\
        --data shards --part test --out tiny.json
    distil-rank generator evaluate --student models/tiny --teacher nferruz/ProtGPT2 \\
        --data heldout --out tiny.json    # heldout: prepared from a FASTA with --held-out 0

Likelihood, calibration, what either writes, speed. `--part test` is refused unless the student's
training left these very proteins out; `--part all` takes every protein of the folder. Below 1,000
proteins the result says underpowered.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distil_rank.core.errors import InputError, at_least

SCHEMA = "distil-rank/generator-evaluation/2"


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
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # arithmetic
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    from distil_rank.core.devices import pick_device
    from distil_rank.core.records import config_record, environment, require_writable, write_json
    from distil_rank.generators.command_prepare import clean
    from distil_rank.generators.evaluate import NEAREST_OF, Bed, compare
    from distil_rank.generators.models import load, require_same_vocabulary
    from distil_rank.generators.prepared import PARTS, Prepared

    at_least(0, generate=config.generate)
    if config.out.is_dir():
        raise InputError(f"a file to write required, got the folder {config.out}; add tiny.json")
    device = pick_device(config.device)
    require_writable(config.out.parent)
    prepared = Prepared(config.data)
    if config.part != "all":
        prepared.require_left_out(config.student)
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
        prepared.joined(parts),
        natural,
        prepared.sequences("train", NEAREST_OF) if config.part != "all" else [],
        config.generate,
        config.seed,
        config.dtype,
        list(clean(config.family_fasta)) if config.family_fasta else (),
    )
    record = compare(student.to(device), teacher.to(device), bed)
    write_json(
        config.out,
        {
            "schema": SCHEMA,
            "config": config_record(config),
            "data": prepared.summary(),
            "seeds": [config.seed],
            **record,
            "environment": environment(device),
            "machine_dependent": ["speed"],
        },
    )
    ratio = record["ratio"]
    power = " (underpowered)" if record["underpowered"] else ""
    interval = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    print(f"{config.out}: perplexity ratio {interval}{power}")
