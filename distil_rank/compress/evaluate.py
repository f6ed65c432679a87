"""A compressed model against its dense original on held-out proteins: what was lost, what it costs.

Pseudo-perplexity masks every residue exactly once, in `passes` forward passes (pass p masks
residues p, p + passes, ...), so about 1 / passes of a protein is masked at a time; 7 is close to
the training rate of 15 %. Both models see the same masks; intervals are paired bootstraps over
proteins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn

from distil_rank.compress.architectures import PHASES, Architecture
from distil_rank.compress.sites import Batch, call, evaluating, tokens_of
from distil_rank.core.intervals import DRAWS, bootstrap_counts, percentile_interval
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import Metric, Record, interval
from distil_rank.proteins.esm2 import Output
from distil_rank.proteins.variants import Assay, additive_scores, masked_marginals


def compare(
    architecture: Architecture,
    dense: nn.Module,
    small: nn.Module,
    batches: Sequence[Batch],
    passes: int = PHASES,
    seed: int = 0,
) -> Record:
    """FVU of the last hidden state; perplexity before and after, their ratio, KL (nats per token).

    All with intervals.
    """
    rows: list[Tensor] = []  # per protein: tokens, nll before, nll after, KL
    hidden: list[Tensor] = []  # per protein: residues, squared error
    before: Moments | None = None
    with evaluating(dense), evaluating(small), torch.no_grad():
        for batch in batches:
            if architecture.has_logits:
                rows.append(_likelihoods(architecture, dense, small, batch, passes))
            mask = architecture.residues(batch)
            x, y = (architecture.read(m, batch)[0] for m in (dense, small))
            error = (y.double() - x.double()).square().sum(-1) * mask
            hidden.append(torch.stack([mask.sum(1).double(), error.sum(1)], 1).cpu())
            before = before or Moments(x.shape[-1], x.device)
            before.update(x[mask])
    assert before is not None
    variance = float(before.covariance.trace())
    sums = torch.cat(hidden)
    counts = bootstrap_counts(len(sums), DRAWS, generator(seed, "bootstrap over proteins"))

    def metric(table: Tensor, value: Callable[[Tensor], Tensor]) -> Metric:
        found = float(value(table.sum(0)))
        return interval(found, *percentile_interval(value(counts @ table)), False)

    def fvu(t: Tensor) -> Tensor:
        return t[..., 1] / t[..., 0] / variance if variance > 0 else 0 * t[..., 0]

    record = {"proteins": len(sums), "residues": int(before.count), "hidden_fvu": metric(sums, fvu)}
    if rows:
        table = torch.cat(rows)
        record |= {
            "tokens": int(table[:, 0].sum()),
            "perplexity_before": metric(table, lambda t: (t[..., 1] / t[..., 0]).exp()),
            "perplexity_after": metric(table, lambda t: (t[..., 2] / t[..., 0]).exp()),
            "perplexity_ratio": metric(
                table, lambda t: ((t[..., 2] - t[..., 1]) / t[..., 0]).exp()
            ),
            "logits_kl": metric(table, lambda t: t[..., 3] / t[..., 0]),
            "kind": "perplexity"
            if architecture.causal
            else f"masked pseudo-perplexity, {passes} passes",
        }
    return record


def _likelihoods(
    architecture: Architecture, dense: nn.Module, small: nn.Module, batch: Batch, passes: int
) -> Tensor:
    """Per protein (B, 4): predicted tokens, negative log-likelihoods, KL(before || after)."""
    tokens = tokens_of(batch)
    assert tokens is not None

    def scores(shown: Batch, targets: Tensor, where: Tensor) -> Tensor:
        length = targets.shape[1]
        logs = [architecture.logits(m, shown)[:, :length] for m in (dense, small)]
        before, after = (x.log_softmax(-1).double() for x in logs)
        picked = [-x.gather(-1, targets[..., None])[..., 0] for x in (before, after)]
        divergence = (before.exp() * (before - after)).sum(-1)
        columns = [torch.ones_like(divergence), *picked, divergence]
        return torch.stack([(c * where).sum(1) for c in columns], 1).cpu()

    if architecture.causal:
        return scores(batch, tokens[:, 1:], batch["attention_mask"][:, 1:].bool())
    residues = architecture.residues(batch)
    position = residues.cumsum(1) - 1
    result = torch.zeros(len(tokens), 4, dtype=torch.float64)
    for turn in range(passes):
        where = residues & (position % passes == turn)
        result += scores(architecture.masked(batch, where), tokens, where)
    return result


class _AsESM2:
    """A masked model of transformers, called as `esm2.ESM2` is."""

    def __init__(self, architecture: Architecture, model: Any):
        self.architecture, self.model = architecture, model
        self.embed_tokens = model.get_input_embeddings()

    def __call__(self, tokens: Tensor, layers: Sequence[int], places: Tensor) -> Output:
        shown = self.architecture.batch(tokens)
        return Output([], self.architecture.logits(self.model, shown)[places])


def mutation_effects(
    architecture: Architecture, models: Mapping[str, nn.Module], assays: Sequence[Assay]
) -> Record:
    """Spearman of masked-marginal scores with measured ones, by assay and model, and its mean."""
    found: Record = {assay.name: {"mutants": len(assay.mutants)} for assay in assays}
    means = {}
    for label, model in models.items():
        scored: Any = model if architecture.kind == "esm2" else _AsESM2(architecture, model)
        for assay in assays:
            scores = additive_scores(masked_marginals(scored, assay.wild_type), assay)
            rho = scipy.stats.spearmanr(scores, assay.scores).statistic
            found[assay.name][label] = float(rho)
        means[f"mean_spearman_{label}"] = float(np.mean([a[label] for a in found.values()]))
    return {"assays": found, "higher_is_better": True, **means}


def cost(dense: nn.Module, small: nn.Module, batch: Batch, rounds: int = 10) -> dict[str, Any]:
    """Milliseconds per forward pass, timed in turn."""
    tokens = tokens_of(batch)
    cuda = tokens.device if tokens is not None and tokens.is_cuda else None
    samples = []
    with evaluating(dense), evaluating(small), torch.inference_mode():
        for _ in range(rounds + 1):
            pair = []
            for model in (dense, small):
                start = time.perf_counter_ns()
                call(model, batch)
                if cuda:
                    torch.cuda.synchronize(cuda)
                pair.append((time.perf_counter_ns() - start) / 1e6)
            samples.append(pair)
    times = np.array(samples[1:])  # the first round warms up
    low, median, high = (float(q) for q in np.percentile(times[:, 0] / times[:, 1], [25, 50, 75]))
    before, after = (float(t) for t in np.median(times, 0))
    return {
        "batch": None if tokens is None else list(tokens.shape),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "before_ms": before,
        "after_ms": after,
        "speedup": {"median": median, "q25": low, "q75": high, "higher_is_better": True},
    }
