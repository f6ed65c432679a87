"""Distil a protein generator into a smaller GPT-2.

    distil-rank generator train --teacher nferruz/ProtGPT2 --data uniref50.fasta --out models/tiny \\
        --n-layer 4 --n-head 4 --n-embd 512 --temperature 2 --alpha 0.5 --train-size-prop 0.1 --learning-rate 1e-3
    distil-rank generator train ... --uncertainty --calibration --smoothing 0.1 --normalise-weights
    torchrun --nproc-per-node 8 -m distil_rank generator train ...

An interrupted run goes on where its last checkpoint stands when the same command is given again. Sizes: tiny 4
layers, 4 heads, 512 wide; small 6, 8, 768; medium 12, 16, 1024; micro 4, 4, 256 for sweeps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from distil_rank.core.errors import InputError
from distil_rank.generators.fit import Teacher
from distil_rank.generators.loss import Objective
from distil_rank.generators.training import (
    TrainingFlags,
    choose_device,
    claim_folder,
    join_processes,
    load_splits,
    run_training,
)


@dataclass(frozen=True, kw_only=True)
class Config(TrainingFlags):
    teacher: str = "nferruz/ProtGPT2"  # folder or name on the Hugging Face hub
    n_layer: int = 4  # layers of the student
    n_head: int = 4  # attention heads
    n_embd: int = 512  # width
    temperature: float = 2.0  # tau: softens both distributions
    alpha: float = 0.5  # share of the cross-entropy to the real tokens; the rest is the divergence from the teacher
    uncertainty: bool = False  # weight positions by the teacher's entropy
    calibration: bool = False  # smooth the teacher where it is unsure
    smoothing: float = 0.1  # strength of --calibration
    normalise_weights: bool = False  # give the weights of --uncertainty mean 1, so that alpha keeps its meaning
    compat: Literal["", "published"] = ""  # published: the formula of the published students, term for term
    init: Literal["random", "slice", "low-rank"] = "random"  # slice, low-rank: start from the teacher's weights
    teacher_cache: Literal["none", "exact", "top"] = "none"  # compute the teacher once; pays when epochs > 1
    top: int = 64  # tokens kept by --teacher-cache top

    @property
    def objective(self) -> Objective:
        return Objective(
            self.temperature, self.alpha, self.uncertainty, self.calibration, self.smoothing, self.normalise_weights
        )


def run(config: Config) -> None:
    from distil_rank.generators.inherit import initial_student
    from distil_rank.generators.models import check_shape, load, parameters, weights_sha256
    from distil_rank.generators.teachers import Cache, Live

    config.check()
    config.objective.check()
    check_shape(config.n_layer, config.n_head, config.n_embd)
    if config.compat == "published" and (config.teacher_cache == "top" or config.normalise_weights):
        raise InputError(
            "--compat published needs all logits and its own weights; drop --teacher-cache top and --normalise-weights"
        )
    device = choose_device(config.device)
    teacher, tokenizer = load(config.teacher)
    splits = load_splits(config)
    folder = claim_folder(config)
    join_processes(device)
    teacher.to(device)
    student = initial_student(teacher, config.n_layer, config.n_head, config.n_embd, config.init, config.seed)

    def source(train: Any) -> Teacher:
        if config.teacher_cache == "none":
            return Live(teacher, config.precision)
        top = min(config.top, teacher.config.vocab_size) if config.teacher_cache == "top" else None
        return Cache(teacher, train, top, config.temperature, config.precision)

    progress = run_training(
        config,
        folder,
        splits,
        tokenizer,
        student,
        source,
        config.objective,
        {
            "kind": "distilled",
            "objective": asdict(config.objective),
            "teacher": {
                "name": config.teacher,
                "weights_sha256": weights_sha256(teacher),
                "parameters": parameters(teacher),
            },
        },
        published=config.compat == "published",
    )
    print(f"{config.out}: validation {progress.best_nll:.4f} nats per token at step {progress.best_step}")
