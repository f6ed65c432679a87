"""Train a small GPT-2 on proteins, to be a teacher where ProtGPT2 cannot be had.

    distil-rank generator pretrain --data proteins.fasta --out models/teacher --n-layer 6
    distil-rank generator pretrain --data proteins.fasta --out models/teacher --tokenizer bpe

Duplicates are removed; validation and test proteins have no relative above 30 % identity in
training. An interrupted run goes on when the same command is given again. The learning rate rises
to 1e-3 where none is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distil_rank.core.errors import at_least
from distil_rank.generators.command_train import TrainingFlags, begin, read_splits, run_training
from distil_rank.generators.data import amino_acid_tokenizer, bpe_tokenizer
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import check_shape, fresh


@dataclass(frozen=True, kw_only=True)
class Config(TrainingFlags):
    n_layer: int = 4  # layers of the network
    n_head: int = 4  # attention heads
    n_embd: int = 256  # width of the network
    context: int = 512  # longest protein in tokens; residues plus about 2 %
    tokenizer: Literal["amino-acids", "bpe"] = "amino-acids"  # bpe: byte pairs trained on the data
    vocabulary: int = 256  # of --tokenizer bpe


def run(config: Config) -> None:
    shape = (config.n_layer, config.n_head, config.n_embd)
    check_shape(*shape)
    at_least(4, context=config.context)
    begin(config, config.schedule())
    splits = read_splits(config)
    if config.tokenizer == "bpe":
        tokenizer = bpe_tokenizer(splits.train, config.vocabulary)
    else:
        tokenizer = amino_acid_tokenizer()
    size, end = len(tokenizer), tokenizer.eos_token_id
    student = fresh(size, *shape, config.context, end, config.seed)
    objective, more = Objective(alpha=1.0), {"kind": "pretrained"}
    run_training(config, config.schedule(), splits, tokenizer, student, objective, more)
