"""Continue training a generator on a family of proteins.

    distil-rank generator prepare family.fasta --tokenizer models/tiny --out family
    distil-rank generator finetune --model models/tiny --data family --out models/tiny-family

The plain cross-entropy on the family. What it cost and how much was only memorized (training
against validation) stands in training.json, `fit`.
"""

from dataclasses import dataclass

from distil_rank.generators.command_train import TrainingFlags, begin, run_training
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import load, require_same_vocabulary, weights_sha256


@dataclass(frozen=True, kw_only=True)
class Config(TrainingFlags):
    model: str  # a model by name, file or folder
    learning_rate: float = 3e-4  # at its peak
    subset: int | None = None  # train on so many proteins drawn at random; None: on all


def run(config: Config) -> None:
    prepared = begin(config)
    model, tokenizer = load(config.model)
    require_same_vocabulary(tokenizer, prepared.tokenizer)
    start = {"name": config.model, "weights_sha256": weights_sha256(model)}
    more = {"kind": "finetuned", "started_from": start}
    run_training(config, prepared, model, Objective(alpha=1.0), more, subset=config.subset)
