"""What pretraining is made of: a fresh model, its start, batches of crops, the schedule."""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from distil_rank.core.randomness import generator
from distil_rank.proteins.esm2 import CLS, EOS, ESM2, PAD, Block, frequencies

_POOL = 4096  # proteins among which batches of similar length are formed


def new_model(layers: int, width: int, heads: int, seed: int) -> ESM2:
    """An ESM-2 with its head, matrices drawn from N(0, 1 / (4 width)), biases 0."""
    with torch.random.fork_rng(devices=[]):  # the global generator is left as it was
        model = ESM2(layers, width, heads, head=True)
    weights = generator(seed, "weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "emb_layer_norm_after.weight":
                # in the place of fair-esm's contact head, so that a seed keeps its weights
                torch.empty(1, layers * heads).normal_(generator=weights)
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5 * width**-0.5, generator=weights)
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def look_at_neighbours(model: ESM2) -> None:
    """Start a fresh model where the statistics of neighbors are one linear map away.

    Every branch ends in zeros, so a layer adds nothing until it has learned to. All heads of a
    layer but the last begin by attending to one relative position each: over the model -1, 1, -2,
    2, ... up to 12 away, then again. With constant queries and keys (their biases), rotary
    attention depends on the offset j - i alone: score = A sum_f cos(theta_f (j - i - offset)), A
    such that the positions next to the offset get e^-2.5 of its weight; heads of fewer than 16
    features see more than one such place.
    """
    offsets = cycle(sign * distance for distance in range(1, 13) for sign in (-1, 1))
    head_width = model.width // model.heads
    theta = frequencies(head_width)
    length = (2.5 / (1 - theta.cos()).sum() * head_width**0.5).sqrt()
    with torch.no_grad():
        for layer in model.layers:
            assert isinstance(layer, Block)
            attention = layer.self_attn
            layer.fc2.weight.zero_()
            attention.out_proj.weight.zero_()
            query, key = (
                project.bias.view(model.heads, 2, -1)
                for project in (attention.q_proj, attention.k_proj)
            )
            for head, offset in zip(range(model.heads - 1), offsets):
                key[head, 0] = length
                query[head] = length * torch.stack([(offset * theta).cos(), (offset * theta).sin()])


def batches(
    encoded: Sequence[Tensor], longest: int, batch_tokens: int, seed: int, skip: int = 0
) -> Iterator[Tensor]:
    """Endless padded batches (n, l + 2) of tokens with <cls> and <eos>, in a new order every epoch.

    Proteins of more than `longest` residues are seen through random windows. Proteins of similar
    length share a batch, at most `batch_tokens` residues with padding each. The first `skip`
    batches are left out, at no cost.
    """
    lengths = torch.tensor([min(len(tokens), longest) for tokens in encoded])
    number, epoch = 0, 0
    while True:
        order = torch.randperm(len(encoded), generator=generator(seed, "order", epoch))
        cuts = torch.rand(len(encoded), generator=generator(seed, "crop", epoch))
        groups: list[list[int]] = []
        for pool in order.split(_POOL):
            group: list[int] = []
            for i in pool[lengths[pool].argsort(stable=True)].tolist():
                if group and (len(group) + 1) * int(lengths[i]) > batch_tokens:
                    groups.append(group)
                    group = []
                group.append(i)
            groups.append(group)
        shuffled = torch.randperm(len(groups), generator=generator(seed, "batches", epoch))
        for group in (groups[g] for g in shuffled.tolist()):
            if number >= skip:
                rows = [_crop(encoded[i], longest, float(cuts[i])) for i in group]
                yield pad_sequence(rows, batch_first=True, padding_value=PAD)
            number += 1
        epoch += 1


def _crop(tokens: Tensor, longest: int, where: float) -> Tensor:
    """<cls>, at most `longest` residues, <eos>."""
    start = int(where * (len(tokens) - longest + 1)) if len(tokens) > longest else 0
    return F.pad(F.pad(tokens[start : start + longest], (1, 0), value=CLS), (0, 1), value=EOS)


def schedule(progress: float, warmup: float) -> float:
    """Fraction of the highest rate: linear rise, then cosine decay to zero."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1, (progress - warmup) / (1 - warmup))))
