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

from distil_rank.core.errors import InputError, above, at_least, at_most
from distil_rank.core.randomness import generator
from distil_rank.generators.data import END, parse, render
from distil_rank.proteins.fasta import clean_sequence

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn. The defaults draw from the model as it is.

    ProtGPT2's authors use top_k 950, repetition_penalty 1.2.
    """

    max_new_tokens: int = 200  # longest protein written, in tokens
    temperature: float = 1.0  # below 1: safer, above 1: more varied
    top_k: int = 0  # draw among the k most probable tokens; 0: among all
    top_p: float = 1.0  # draw among the most probable tokens of this joint probability
    repetition_penalty: float = 1.0  # above 1: fewer repeats
    prompt: str = ""  # residues that every protein begins with

    def check(self) -> None:
        at_least(0, top_k=self.top_k)
        at_least(1, max_new_tokens=self.max_new_tokens)
        above(0, temperature=self.temperature, top_p=self.top_p)
        above(0, repetition_penalty=self.repetition_penalty)
        at_most(1, top_p=self.top_p)

    def start(self, tokenizer: Any, context: int) -> list[int]:
        """Tokens that are given, the end token first; InputError where the context is too short."""
        self.check()
        given = [int(tokenizer.eos_token_id)]
        if self.prompt:
            text = render(clean_sequence(self.prompt)).removesuffix(f"\n{END}")
            given = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(given) + self.max_new_tokens > context:
            raise InputError(
                f"--max-new-tokens of at most {context - len(given)} required (a context of"
                f" {context}, {len(given)} given), got {self.max_new_tokens}"
            )
        return given


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
    start = sampler.start(tokenizer, model.config.n_positions)
    at_least(1, batch_size=batch_size)
    working = copy.deepcopy(model).to(getattr(torch, dtype)).eval()
    for first in range(indices.start, indices.stop, batch_size):
        part = range(first, min(first + batch_size, indices.stop))
        yield from _batch(working, tokenizer, part, sampler, seed, start)


def _batch(
    model: Any, tokenizer: Any, indices: range, sampler: Sampler, seed: int, start: list[int]
) -> Iterator[Drawn]:
    device, end, b = next(model.parameters()).device, tokenizer.eos_token_id, len(indices)
    steps = sampler.max_new_tokens
    streams = (generator(seed, "generate", i) for i in indices)
    rows = [torch.rand(steps, generator=stream, dtype=torch.float64) for stream in streams]
    uniform = torch.stack(rows).to(device)
    tokens = unread = torch.tensor(start, device=device).expand(b, -1)
    ended = torch.zeros(b, dtype=torch.bool, device=device)
    nll, count = torch.zeros(b, dtype=torch.float64, device=device), torch.zeros(b, device=device)
    past = None
    for step in range(steps):
        out = model(input_ids=unread, past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, out.logits[:, -1].double()
        chosen = choose(logits, tokens, uniform[:, step], sampler)
        surprise = -torch.log_softmax(logits, -1).gather(1, chosen[:, None])[:, 0]
        nll += torch.where(ended, 0.0, surprise)
        count += ~ended
        unread = torch.where(ended, end, chosen)[:, None]
        tokens = torch.cat([tokens, unread], 1)
        ended |= chosen == end
        if bool(ended.all()):
            break
    for row, index in enumerate(indices):
        written = tokens[row, : len(start) + int(count[row])].tolist()
        sequence, closed = parse(tokenizer.decode(written))
        yield Drawn(index, sequence, closed, float((nll[row] / count[row]).exp()), int(count[row]))


def choose(logits: Tensor, tokens: Tensor, uniform: Tensor, sampler: Sampler) -> Tensor:
    """Next tokens (b,) from logits (b, V), tokens so far (b, t) and uniform numbers (b,)."""
    from transformers import generation

    if sampler.repetition_penalty != 1:
        penalty = generation.RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty)
        logits = penalty(tokens, logits)
    logits = logits / sampler.temperature
    if sampler.top_k:
        logits = generation.TopKLogitsWarper(sampler.top_k)(tokens, logits)
    if sampler.top_p < 1:
        logits = generation.TopPLogitsWarper(sampler.top_p)(tokens, logits)
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp_max(logits.shape[-1] - 1)
