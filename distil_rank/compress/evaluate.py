"""A compressed model against its dense original on held-out proteins: what was lost, what it costs.

Pseudo-perplexity masks every residue exactly once, in `passes` forward passes (pass p masks
residues p, p + passes, ...), so about 1 / passes of a protein is masked at a time; 7 is close to
the training rate of 15 %. Both models see the same masks; intervals are paired bootstraps over
proteins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn

from distil_rank.compress.architectures import PHASES, Architecture
from distil_rank.compress.sites import Batch, call, evaluating, tokens_of
from distil_rank.core.intervals import DRAWS, bootstrap_counts, percentile_interval
from distil_rank.core.latency import interleaved, quartiles
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
    """FVU of the last hidden state and KL of what the head predicts, in nats a prediction.

    Of a language model also the perplexity before and after and their ratio; of a regression the
    FVU of its outputs. All with intervals.
    """
    rows: list[Tensor] = []  # per protein: predictions, KL, nll before, nll after
    hidden, numbers = _Squared(), _Squared()
    with evaluating(dense), evaluating(small), torch.no_grad():
        for batch in batches:
            (x, before), (y, after) = (architecture.read(m, batch) for m in (dense, small))
            mask = architecture.residues(batch)
            hidden.add(x, y, mask)
            if before is None or after is None:
                continue
            if architecture.predicts_numbers:
                if before.ndim == 2:  # of a protein
                    before, after, mask = before[:, None], after[:, None], mask[:, :1] | True
                numbers.add(before, after, mask)
            elif architecture.task == "masked":
                rows.append(masked_divergence(architecture, dense, small, batch, passes))
            else:
                rows.append(_divergence(architecture, before, after, batch, batch))
    sums = torch.cat(hidden.rows)
    counts = bootstrap_counts(len(sums), DRAWS, generator(seed, "bootstrap over proteins"))

    def metric(table: Tensor, value: Callable[[Tensor], Tensor]) -> Metric:
        found = float(value(table.sum(0)))
        return interval(found, *percentile_interval(value(counts @ table)), False)

    record: Record = {"proteins": len(sums), "residues": int(sums[:, 0].sum())}
    record["hidden_fvu"] = metric(sums, hidden.fvu)
    if numbers.rows:
        record["output_fvu"] = metric(torch.cat(numbers.rows), numbers.fvu)
    if rows:
        table = torch.cat(rows)
        record["predictions"] = int(table[:, 0].sum())
        record["logits_kl"] = metric(table, lambda t: t[..., 1] / t[..., 0])
    if rows and architecture.task in ("masked", "causal"):
        record |= {
            "perplexity_before": metric(table, lambda t: (t[..., 2] / t[..., 0]).exp()),
            "perplexity_after": metric(table, lambda t: (t[..., 3] / t[..., 0]).exp()),
            "perplexity_ratio": metric(
                table, lambda t: ((t[..., 3] - t[..., 2]) / t[..., 0]).exp()
            ),
            "kind": "perplexity"
            if architecture.task == "causal"
            else f"masked pseudo-perplexity, {passes} passes",
        }
    return record


class _Squared:
    """Squared error of vectors by protein, over the variance of the dense model's."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # per protein: vectors, squared error
        self.before: Moments | None = None

    def add(self, x: Tensor, y: Tensor, mask: Tensor) -> None:
        """x before and y after (B, T, d), mask (B, T) of those that count."""
        error = (y.double() - x.double()).square().sum(-1) * mask
        self.rows.append(torch.stack([mask.sum(1).double(), error.sum(1)], 1).cpu())
        self.before = self.before or Moments(x.shape[-1], x.device)
        self.before.update(x[mask])

    def fvu(self, sums: Tensor) -> Tensor:
        assert self.before is not None
        variance = float(self.before.covariance.trace())
        return sums[..., 1] / sums[..., 0] / variance if variance > 0 else 0 * sums[..., 0]


def masked_divergence(
    architecture: Architecture, dense: nn.Module, small: nn.Module, batch: Batch, passes: int
) -> Tensor:
    """`_divergence` (B, 4) with every residue masked once."""
    residues = architecture.residues(batch)
    position = residues.cumsum(1) - 1
    result = torch.zeros(len(residues), 4, dtype=torch.float64)
    for turn in range(passes):
        shown = architecture.masked(batch, residues & (position % passes == turn))
        before, after = (architecture.read(m, shown)[1] for m in (dense, small))
        assert before is not None and after is not None
        result += _divergence(architecture, before, after, shown, batch)
    return result


def _divergence(
    architecture: Architecture, before: Tensor, after: Tensor, shown: Batch, batch: Batch
) -> Tensor:
    """Per protein (B, 4): predictions, KL(before || after), negative log-likelihoods of tokens."""
    (p, where), (q, _) = (architecture.scored(y.double(), shown) for y in (before, after))
    divergence = (p.exp() * (p - q)).flatten(2).sum(-1)
    columns = [torch.ones_like(divergence), divergence]
    tokens = tokens_of(batch)
    if architecture.task in ("masked", "causal") and tokens is not None:
        targets = tokens[:, 1:] if architecture.task == "causal" else tokens
        columns += [-x.gather(-1, targets[..., None])[..., 0] for x in (p, q)]
    columns += [torch.zeros_like(divergence)] * (4 - len(columns))
    return torch.stack([(c * where).sum(1) for c in columns], 1).cpu()


class _AsESM2:
    """A masked model of transformers, called as `esm2.ESM2` is."""

    def __init__(self, architecture: Architecture, model: Any):
        self.architecture, self.model = architecture, model
        self.embed_tokens = model.get_input_embeddings()

    def __call__(self, tokens: Tensor, layers: Sequence[int], places: Tensor) -> Output:
        shown = self.architecture.batch(tokens)
        logits = self.architecture.read(self.model, shown)[1]
        assert logits is not None
        return Output([], logits[places])


def mutation_effects(
    architecture: Architecture, dense: nn.Module, small: nn.Module, assays: Sequence[Assay]
) -> Record:
    """Spearman of masked-marginal scores with measured ones, by assay, before and after; means."""
    found: Record = {assay.name: {"mutants": len(assay.mutants)} for assay in assays}
    means = {}
    for label, model in (("before", dense), ("after", small)):
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
    assert tokens is not None
    calls: list[Callable[[], object]] = [partial(call, m, batch) for m in (dense, small)]
    with evaluating(dense), evaluating(small), torch.inference_mode():
        times = interleaved(calls, tokens, rounds)
    before, after = (float(t) for t in np.median(times, 0))
    return {
        "batch": list(tokens.shape),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "before_ms": before,
        "after_ms": after,
        "speedup": quartiles(times[:, 0] / times[:, 1], True),
    }
