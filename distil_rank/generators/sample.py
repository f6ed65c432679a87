"""Drawing proteins from a generator: protein i depends on (seed, i), not on how many are drawn.

Every protein has its own stream of uniform numbers, and a token is the inverse of the cumulative
distribution at the next of them. What is left of the batch is rounding in the logits: in float32
two batch sizes differ in about one token of a million, in float64 in none that we saw.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distil_rank.core.errors import InputError, at_least
from distil_rank.core.randomness import generator
from distil_rank.generators.data import parse

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn. The defaults draw from the model as it is.

    ProtGPT2's authors use top_k 950, repetition_penalty 1.2.
    """

    max_new_tokens: int = 200  # longest text written, in tokens
    temperature: float = 1.0  # below 1: safer, above 1: more varied
    top_k: int = 0  # draw among the k most probable tokens; 0: among all
    repetition_penalty: float = 1.0  # divides positive logits of tokens used, multiplies negative

    def check(self, context: int) -> None:
        if not 1 <= self.max_new_tokens < context:
            raise InputError(
                f"max-new-tokens must be at least 1 and below the model's context of {context},"
                f" got {self.max_new_tokens}"
            )
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, got {self.temperature}; 1 is usual")
        at_least(0, top_k=self.top_k)
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition-penalty must be above 0, got {self.repetition_penalty}")


@dataclass(frozen=True)
class Drawn:
    """One generated protein."""

    index: int
    sequence: str  # residues; what a model wrote between line breaks, valid or not
    ended: bool  # by the end token, not by max_new_tokens
    perplexity: float  # of the drawn tokens under the model at temperature 1
    tokens: int


@torch.no_grad()
def draw(
    model: Any,
    tokenizer: Any,
    indices: range,
    sampler: Sampler,
    seed: int = 0,
    batch_size: int = 32,
    dtype: Dtype = "float32",
) -> Iterator[Drawn]:
    """Proteins of these indices, in order. The model is used as a copy in `dtype`."""
    sampler.check(model.config.n_positions)
    at_least(1, batch_size=batch_size)
    working = copy.deepcopy(model).to(getattr(torch, dtype)).eval()
    for start in range(indices.start, indices.stop, batch_size):
        yield from _batch(
            working, tokenizer, range(start, min(start + batch_size, indices.stop)), sampler, seed
        )


def _batch(
    model: Any, tokenizer: Any, indices: range, sampler: Sampler, seed: int
) -> Iterator[Drawn]:
    device, end, b = next(model.parameters()).device, tokenizer.eos_token_id, len(indices)
    steps = sampler.max_new_tokens
    streams = (generator(seed, "generate", i) for i in indices)
    rows = [torch.rand(steps, generator=stream, dtype=torch.float64) for stream in streams]
    uniform = torch.stack(rows).to(device)
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
