"""What needs no transformer: masked residues from composition and neighbours, one weight each.

    logits = log((counts + alpha f) / (n + alpha)) + sum_k W_k x_(i+k),   |k| <= 12

counts are the n visible residues of the protein and f = softmax(b), so that without W this is the
Dirichlet-multinomial prediction; x is one-hot and may be <mask>. Trained like the models, on the
same batches and masks; a nano model that is no better than this has learned no more than statistics
of pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distil_rank.core.randomness import generator
from distil_rank.proteins.command_pretrain import Config
from distil_rank.proteins.esm2 import tokenise
from distil_rank.proteins.fasta import AMINO_ACIDS
from distil_rank.proteins.masked import mask
from distil_rank.proteins.pretrain import batches

REACH = 12
LETTERS = 33
RESIDUES = torch.zeros(LETTERS).index_fill(0, tokenise([AMINO_ACIDS])[0, 1:-1], 1.0)


class Additive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.zeros(LETTERS))  # b: log f up to a constant
        self.concentration = nn.Parameter(torch.tensor(4.0))  # log alpha
        self.neighbours = nn.Parameter(torch.zeros(LETTERS, LETTERS, 2 * REACH + 1))  # W

    def forward(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Logits (k, 33) of the k chosen positions of tokens (n, l)."""
        x = F.one_hot(tokens, LETTERS).float()
        visible = x * RESIDUES
        counts = (visible.sum(1, keepdim=True) - visible)[chosen]
        alpha = self.concentration.exp()
        composition = (counts + alpha * self.frequencies.softmax(0)).log() - (
            counts.sum(-1, keepdim=True) + alpha
        ).log()
        window = F.conv1d(x.transpose(1, 2), self.neighbours, padding=REACH).transpose(1, 2)
        return composition + window[chosen]


def train(sequences: Sequence[str], config: Config) -> Additive:
    """AdamW, its rate falling to zero, over `config.tokens` residues of its batches."""
    model = Additive()
    rates = (1e-2, 1e-3)  # of composition, of the neighbours
    groups = [{"params": [model.frequencies, model.concentration]}, {"params": [model.neighbours]}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    step = seen = 0
    encoded = [tokenise([sequence])[0, 1:-1] for sequence in sequences]
    for batch in batches(encoded, config.max_length, config.batch_tokens, config.seed):
        if seen >= config.tokens:
            break
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (1 - seen / config.tokens)
        tokens, chosen = mask(batch, generator(config.seed, "mask", step))
        optimizer.zero_grad()
        F.cross_entropy(model(tokens, chosen), batch[chosen]).backward()
        optimizer.step()
        step, seen = step + 1, seen + int((batch > 3).sum())
    return model
