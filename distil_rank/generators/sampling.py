"""Drawing proteins from a generator; protein i depends on (seed, i) alone, not on how many are drawn together.

Every protein has its own stream of uniform numbers, and a token is the inverse of the cumulative distribution at the
next of them. What is left of the batch is rounding in the logits, so the model runs in float64 unless told otherwise:
float32 is faster, and two batch sizes then differ in about one token of a million.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.generators.data import parse
from distil_rank.core.randomness import generator

Dtype = Literal["float64", "float32", "bfloat16"]


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn. The defaults draw from the model as it is; ProtGPT2's authors use top_k 950, penalty
    1.2."""

    max_length: int = 200  # tokens, the start token counted
    temperature: float = 1.0  # below 1: safer, above 1: more varied
    top_k: int = 0  # draw among the k most probable tokens; 0: among all
    repetition_penalty: float = 1.0  # divides positive (multiplies negative) logits of tokens already used

    def check(self, context: int) -> None:
        if not 2 <= self.max_length <= context:
            raise InputError(
                f"max-length must be between 2 and the model's context of {context}, got {self.max_length}"
            )
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, got {self.temperature}; 1 draws from the model as it is")
        if self.top_k < 0 or not self.repetition_penalty > 0:
            raise InputError(
                f"top-k of at least 0 and repetition-penalty above 0 required, got {self.top_k} and "
                f"{self.repetition_penalty}"
            )


@dataclass(frozen=True)
class Drawn:
    """One generated protein."""

    index: int
    sequence: str  # residues; what a model wrote between line breaks, valid or not
    ended: bool  # by the end token, not by max_length
    perplexity: float  # of the drawn tokens under the model at temperature 1
    tokens: int


@torch.no_grad()
def draw(
    model: Any,
    tokenizer: Any,
    indices: range,
    sampler: Sampler,
    seed: int = 0,
    batch_size: int = 16,
    dtype: Dtype = "float64",
) -> Iterator[Drawn]:
    """Proteins of these indices, in order. The model is used as a copy in `dtype`."""
    import copy

    sampler.check(model.config.n_positions)
    if batch_size < 1:
        raise InputError(f"batch-size must be at least 1, got {batch_size}")
    working = copy.deepcopy(model).to(getattr(torch, dtype)).eval()
    for start in range(indices.start, indices.stop, batch_size):
        yield from _batch(working, tokenizer, range(start, min(start + batch_size, indices.stop)), sampler, seed)


def _batch(model: Any, tokenizer: Any, indices: range, sampler: Sampler, seed: int) -> Iterator[Drawn]:
    device, end, b = next(model.parameters()).device, tokenizer.eos_token_id, len(indices)
    steps = sampler.max_length - 1
    uniform = torch.stack(
        [torch.rand(steps, generator=generator(seed, "generate", i), dtype=torch.float64) for i in indices]
    ).to(device)
    tokens = torch.full((b, 1), end, device=device)
    ended = torch.zeros(b, dtype=torch.bool, device=device)
    nll, count = torch.zeros(b, dtype=torch.float64, device=device), torch.zeros(b, device=device)
    past = None
    for step in range(steps):
        out = model(input_ids=tokens[:, -1:], past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, out.logits[:, -1].double()
        chosen = choose(logits, tokens, uniform[:, step], sampler)
        surprise = -torch.log_softmax(logits, -1).gather(1, chosen[:, None])[:, 0]
        nll += torch.where(ended, 0.0, surprise)
        count += ~ended
        tokens = torch.cat([tokens, torch.where(ended, end, chosen)[:, None]], 1)
        ended |= chosen == end
        if bool(ended.all()):
            break
    for row, index in enumerate(indices):
        written = tokens[row, : 1 + int(count[row])].tolist()
        sequence, closed = parse(tokenizer.decode(written))
        yield Drawn(index, sequence, closed, float((nll[row] / count[row]).exp()), int(count[row]))


def choose(logits: Tensor, tokens: Tensor, uniform: Tensor, sampler: Sampler) -> Tensor:
    """Next tokens (b,) from logits (b, V), tokens so far (b, t) and uniform numbers (b,)."""
    if sampler.repetition_penalty != 1:
        used = logits.gather(1, tokens)
        penalty = sampler.repetition_penalty
        logits = logits.scatter(1, tokens, torch.where(used > 0, used / penalty, used * penalty))
    logits = logits / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        least = logits.topk(sampler.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp_max(logits.shape[-1] - 1)
