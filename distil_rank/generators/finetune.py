"""Continue training a generator on a family of proteins.

    distil-rank generator finetune --model models/tiny --data family.fasta --out models/tiny-family --epochs 5

The plain cross-entropy on the family; validation proteins have no near relative in training, so a family of close
relatives needs a higher `--identity` (0.9), or every protein would be in one part.
"""

from __future__ import annotations

from dataclasses import dataclass

from distil_rank.core.errors import InputError
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
    model: str  # folder or hub name of the generator to start from
    identity: float = 0.3  # relatives above this identity never straddle training and validation
    held_out: float = 0.1  # share of the proteins for validation, and as many for test
    learning_rate: float = 3e-4  # peak


def run(config: Config) -> None:
    from distil_rank.generators.models import load, weights_sha256

    config.check()
    if not 0 < config.identity <= 1:
        raise InputError(f"identity must be above 0 and at most 1, got {config.identity}; 0.9 suits a close family")
    model, tokenizer = load(config.model)
    splits = load_splits(config, config.identity)
    folder = claim_folder(config)
    join_processes(choose_device(config.device))
    start = weights_sha256(model)
    progress = run_training(
        config, folder, splits, tokenizer, model, lambda _: None, Objective(alpha=1.0),
        {"kind": "finetuned", "started_from": {"name": config.model, "weights_sha256": start}},
    )  # fmt: skip
    print(f"{config.out}: validation {progress.best_nll:.4f} nats per token at step {progress.best_step}")
