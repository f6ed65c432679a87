"""Train a small GPT-2 on proteins, to be a teacher where ProtGPT2 cannot be had.

    distil-rank generator prepare proteins.fasta --out shards
    distil-rank generator pretrain --data shards --out models/teacher --n-layer 6

Tokenizer and context are those of the prepared proteins. An interrupted run goes on when the same
command is given again.
"""

from dataclasses import dataclass

from distil_rank.generators.command_train import ShapeFlags, TrainingFlags, begin, run_training
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import fresh


@dataclass(frozen=True, kw_only=True)
class Config(ShapeFlags, TrainingFlags):
    """Flags."""


def run(config: Config) -> None:
    shape = config.shape
    prepared = begin(config)
    size, record = len(prepared.tokenizer), prepared.record
    student = fresh(size, *shape, record["context"], record["end"], config.seed)
    run_training(config, prepared, student, Objective(alpha=1.0), {"kind": "pretrained"})
