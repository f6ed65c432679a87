"""Train a small GPT-2 on proteins, to be a teacher where ProtGPT2 cannot be had.

    distil-rank generator pretrain --data proteins.fasta --out models/teacher --n-layer 6 --n-head 4 --n-embd 160
    distil-rank generator pretrain --data proteins.fasta --out models/teacher --tokenizer bpe --vocabulary 512

Exact duplicates are removed, and validation and test proteins have no relative above 30 % identity in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    n_layer: int = 6  # layers
    n_head: int = 4  # attention heads
    n_embd: int = 160  # width
    context: int = 512  # longest protein in tokens; residues plus about 2 %
    tokenizer: Literal["amino-acids", "bpe"] = "amino-acids"  # one token per residue, or byte pairs trained on the data
    vocabulary: int = 256  # of --tokenizer bpe


def run(config: Config) -> None:
    from distil_rank.generators.data import amino_acid_tokenizer, bpe_tokenizer
    from distil_rank.generators.models import check_shape, fresh

    config.check()
    check_shape(config.n_layer, config.n_head, config.n_embd)
    if config.context < 4:
        raise InputError(f"a context of at least 4 tokens required, got {config.context}; 512 fits most domains")
    splits = load_splits(config)
    folder = claim_folder(config)
    join_processes(choose_device(config.device))
    tokenizer = (
        amino_acid_tokenizer() if config.tokenizer == "amino-acids" else bpe_tokenizer(splits.train, config.vocabulary)
    )
    shape = (config.n_layer, config.n_head, config.n_embd)
    student = fresh(len(tokenizer), *shape, config.context, tokenizer.eos_token_id, config.seed)
    progress = run_training(
        config, folder, splits, tokenizer, student, lambda _: None, Objective(alpha=1.0), {"kind": "pretrained"}
    )
    print(f"{config.out}: validation {progress.best_nll:.4f} nats per token at step {progress.best_step}")
