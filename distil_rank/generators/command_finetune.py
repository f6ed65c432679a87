"""Continue training a generator on a family of proteins.

    distil-rank generator finetune --model models/tiny --data family.fasta --out models/tiny-family

The learning rate rises to 3e-4 where none is given.

The plain cross-entropy on the family. Validation proteins have no near relative in training, so a
family of close relatives needs a higher `--identity` (0.9), or every protein would be in one part.
"""

from __future__ import annotations

from dataclasses import dataclass

from distil_rank.core.errors import above, at_most
from distil_rank.generators.command_train import TrainingFlags, begin, read_splits, run_training
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import load, weights_sha256

RATE = 3e-4


@dataclass(frozen=True, kw_only=True)
class Config(TrainingFlags):
    model: str  # a model by name, file or folder
    identity: float = 0.3  # relatives above it never straddle training and what is kept aside


def run(config: Config) -> None:
    above(0, identity=config.identity)
    at_most(1, identity=config.identity)
    schedule = config.schedule(RATE)
    begin(config, schedule)
    model, tokenizer = load(config.model)
    start = {"name": config.model, "weights_sha256": weights_sha256(model)}
    more = {"kind": "finetuned", "started_from": start}
    splits = read_splits(config, config.identity)
    run_training(config, schedule, splits, tokenizer, model, Objective(alpha=1.0), more)
