"""Evaluate a student beside its teacher on held-out proteins.

    distil-rank generator evaluate --student models/tiny --teacher nferruz/ProtGPT2 \\
        --data heldout.fasta --out tiny.json
    distil-rank generator evaluate --student models/nano-student --teacher models/nano-teacher \\
        --data proteins.fasta --part test --out nano.json

Likelihood, calibration, what either writes, speed. `--part test` takes the test proteins of the
split stored with the student's training, found again in the same file; `--part all` every protein.
Below 1,000 proteins the result says underpowered.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distil_rank.core.errors import InputError, at_least

SCHEMA = "distil-rank/generator-evaluation/1"


@dataclass(frozen=True)
class Config:
    student: str  # a generator by folder or name on the Hugging Face hub
    teacher: str  # a generator by folder or name on the Hugging Face hub
    data: Path  # proteins: FASTA (plain or gzip), or CSV, TSV or parquet with a column `sequence`
    out: Path  # where to write
    # every protein, or the test part of the student's training
    part: Literal["all", "test"] = "all"
    # proteins that novelty is measured against; None: the training part
    training: Path | None = None
    max_length: int = 1022  # longest protein in residues
    generate: int = 200  # proteins written by either model
    structures: bool = False  # fold what is written with ESMFold (needs its weights), report pLDDT
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # arithmetic
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    from distil_rank.core.devices import pick_device
    from distil_rank.core.records import (
        config_record,
        environment,
        require_writable,
        sha256,
        shown_path,
        write_json,
    )
    from distil_rank.generators.data import encode, read_sequences
    from distil_rank.generators.evaluate import Bed, compare
    from distil_rank.generators.models import load, require_same_vocabulary

    at_least(0, generate=config.generate)
    device = pick_device(config.device)
    require_writable(config.out.parent)
    student, tokenizer = load(config.student)
    teacher, teacher_tokenizer = load(config.teacher)
    require_same_vocabulary(teacher_tokenizer, tokenizer)
    natural, training, counts = proteins(config)
    if config.training:
        training = read_sequences(config.training)
    context = min(student.config.n_positions, teacher.config.n_positions)
    bed = Bed(
        tokenizer,
        encode(natural, tokenizer, context),
        natural,
        training,
        config.generate,
        config.seed,
        config.dtype,
        config.structures,
    )
    record = compare(student.to(device), teacher.to(device), bed)
    source = {"source": shown_path(config.data), "sha256": sha256(config.data)}
    write_json(
        config.out,
        {
            "schema": SCHEMA,
            "config": config_record(config),
            "data": {**source, **counts, "n_test": len(natural)},
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


def proteins(config: Config) -> tuple[list[str], list[str], dict[str, int]]:
    """Proteins to evaluate on, those that the student was trained on where known, and counts."""
    from distil_rank.generators.data import load_split, read_sequences

    sequences = read_sequences(config.data)
    if config.part == "test":
        splits = load_split(Path(config.student), sequences)
        natural, training, counts = splits.test, splits.train, dict(splits.counts)
    else:
        distinct = list(dict.fromkeys(sequences))
        natural, training = [s for s in distinct if len(s) <= config.max_length], []
        counts = {"read": len(sequences), "too_long_left_out": len(distinct) - len(natural)}
    if len(natural) < 2:
        raise InputError(
            f"at least two distinct proteins of at most {config.max_length} residues required in"
            f" {config.data}, got {len(natural)}; give more"
        )
    return natural, training, counts
