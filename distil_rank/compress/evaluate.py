"""A compressed model against its dense original on held-out proteins: likelihood, divergence, mutations, time, bytes.

Pseudo-perplexity masks every residue exactly once, in `passes` forward passes (pass p masks residues p, p + passes, ...), so
about 1 / passes of a protein is masked at a time; passes = 7 is close to the training rate of 15 %. Both models see the
same masks, and intervals are paired bootstraps over proteins.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.compress.architectures import AMINO_ACIDS, Architecture
from distil_rank.compress.quantise import module_bytes
from distil_rank.compress.sites import Batch, evaluating, tokens_of
from distil_rank.core.randomness import generator
from distil_rank.core.records import interval
from distil_rank.core.intervals import bootstrap_counts, percentile_interval

PASSES = 7
DRAWS = 1000


def compare(
    architecture: Architecture,
    dense: nn.Module,
    small: nn.Module,
    batches: Sequence[Batch],
    passes: int = PASSES,
    seed: int = 0,
) -> dict[str, Any]:
    """Perplexities before and after, their ratio, logits KL (nats per token) and FVU of the last hidden state, with intervals."""
    rows: list[Tensor] = []  # per protein: tokens, nll before, nll after, KL
    hidden: list[Tensor] = []  # per protein: residues, squared error
    total, squares, count = torch.zeros(1, dtype=torch.float64), 0.0, 0
    with evaluating(dense), evaluating(small), torch.no_grad():
        for batch in batches:
            if architecture.has_logits:
                rows.append(_likelihoods(architecture, dense, small, batch, passes))
            mask = architecture.residues(dense, batch)
            before = architecture.hidden(dense, batch).double()
            error = (architecture.hidden(small, batch).double() - before).square().sum(-1) * mask
            hidden.append(torch.stack([mask.sum(1).double(), error.sum(1)], 1))
            kept = before[mask]
            total, squares, count = total + kept.sum(0), squares + float(kept.square().sum()), count + len(kept)
    mean = total / max(1, count)
    variance = squares / max(1, count) - float((mean * mean).sum()) if count else 0.0
    counts = bootstrap_counts(sum(map(len, hidden)), DRAWS, generator(seed, "bootstrap over proteins"))
    sums = torch.cat(hidden)

    def hidden_fvu(total: Tensor) -> Tensor:
        return total[..., 1] / total[..., 0] / variance if variance > 0 else 0 * total[..., 0]

    record = {"proteins": len(sums), "residues": count, "hidden_fvu": _metric(sums, counts, hidden_fvu, False)}
    if rows:
        table = torch.cat(rows)
        record["tokens"] = int(table[:, 0].sum())
        record["perplexity_before"] = _metric(table, counts, lambda t: (t[..., 1] / t[..., 0]).exp(), False)
        record["perplexity_after"] = _metric(table, counts, lambda t: (t[..., 2] / t[..., 0]).exp(), False)
        record["perplexity_ratio"] = _metric(
            table, counts, lambda t: ((t[..., 2] - t[..., 1]) / t[..., 0]).exp(), False
        )
        record["logits_kl"] = _metric(table, counts, lambda t: t[..., 3] / t[..., 0], False)
        record["kind"] = "perplexity" if architecture.causal else f"masked pseudo-perplexity, {passes} passes"
    return record


def _metric(table: Tensor, counts: Tensor, value: Any, higher_is_better: bool) -> dict[str, Any]:
    return interval(float(value(table.sum(0))), *percentile_interval(value(counts @ table)), higher_is_better)


def _likelihoods(architecture: Architecture, dense: nn.Module, small: nn.Module, batch: Batch, passes: int) -> Tensor:
    """Per protein (B, 4): predicted tokens, negative log-likelihood before and after, KL(before || after)."""
    tokens = tokens_of(batch)
    assert tokens is not None
    if architecture.causal:
        return _scores(
            architecture, dense, small, batch, tokens[:, 1:], batch["attention_mask"][:, 1:].bool(), slice(-1)
        )
    residues = architecture.residues(dense, batch)
    position = residues.cumsum(1) - 1
    result = torch.zeros(len(tokens), 4, dtype=torch.float64)
    for turn in range(passes):
        where = residues & (position % passes == turn)
        result += _scores(architecture, dense, small, architecture.masked(batch, where), tokens, where, slice(None))
    return result


def _scores(
    architecture: Architecture,
    dense: nn.Module,
    small: nn.Module,
    batch: Batch,
    targets: Tensor,
    where: Tensor,
    cut: slice,
) -> Tensor:
    before, after = (architecture.logits(m, batch)[:, cut].log_softmax(-1).double() for m in (dense, small))
    picked = [-logs.gather(-1, targets[..., None])[..., 0] for logs in (before, after)]
    divergence = (before.exp() * (before - after)).sum(-1)
    columns = [torch.ones_like(divergence), *picked, divergence]
    return torch.stack([(c * where).sum(1) for c in columns], 1)


def perplexity(architecture: Architecture, model: nn.Module, batches: Sequence[Batch], passes: int = PASSES) -> float:
    """Perplexity (causal) or masked pseudo-perplexity of one model."""
    with evaluating(model), torch.no_grad():
        table = sum(
            (_likelihoods(architecture, model, model, batch, passes).sum(0) for batch in batches),
            torch.zeros(4).double(),
        )
    return math.exp(float(table[1] / table[0]))


def mutation_scores(architecture: Architecture, model: nn.Module, sequence: str) -> Tensor:
    """Masked-marginal log-odds (l, 20) of each amino acid against the wild type, every position masked on its own.

    Meier et al., NeurIPS 2021. Columns in the order of `AMINO_ACIDS`.
    """
    tokens = tokens_of(architecture.tokenise([sequence]))
    assert tokens is not None
    length = len(sequence)
    where = torch.zeros(length, tokens.shape[1], dtype=torch.bool)
    where[torch.arange(length), torch.arange(length) + 1] = True
    step = max(1, 8192 // tokens.shape[1])
    rows = []
    with evaluating(model), torch.no_grad():
        for start in range(0, length, step):
            part = where[start : start + step]
            batch = architecture.masked(architecture.batch(tokens.expand(len(part), -1)), part)
            rows.append(architecture.logits(model, batch)[part].log_softmax(-1))
    logs = torch.cat(rows).double()
    letters = torch.tensor(list(AMINO_ACIDS.values()))
    return logs[:, letters] - logs.gather(1, tokens[0, 1 : length + 1, None])


def read_assays(folder: str | Path) -> dict[str, tuple[str, list[tuple[int, str]], np.ndarray]]:
    """NAME.csv (mutant, score) beside NAME.fasta (wild type) in a folder: name -> (sequence, (position, letter), scores)."""
    folder = Path(folder)
    assays = {}
    for table in sorted(folder.glob("*.csv")):
        wild = table.with_suffix(".fasta")
        if not wild.is_file():
            raise InputError(f"a wild-type FASTA beside {table.name} required, got none; add {wild.name}")
        sequence = "".join(line.strip() for line in wild.read_text().splitlines() if not line.startswith(">"))
        mutants, scores = [], []
        with table.open() as file:
            for row in csv.DictReader(file):
                name = row.get("mutant", "")
                position = int(name[1:-1]) - 1 if name[1:-1].isdigit() else -1
                if not 0 <= position < len(sequence) or sequence[position] != name[0]:
                    raise InputError(f"mutants like A24G of the wild type required in {table.name}, got {name!r}")
                if name[-1] in AMINO_ACIDS:
                    mutants.append((position, name[-1]))
                    scores.append(float(row["score"]))
        if len(scores) < 3:
            raise InputError(f"at least 3 scored single mutants required in {table.name}, got {len(scores)}")
        assays[table.stem] = (sequence, mutants, np.array(scores))
    if not assays:
        raise InputError(f"assays NAME.csv with NAME.fasta required in {folder}, got none")
    return assays


def mutation_effects(architecture: Architecture, models: dict[str, nn.Module], folder: str | Path) -> dict[str, Any]:
    """Spearman of masked-marginal scores with the measured ones, by assay and model, and its mean over assays."""
    columns = {letter: i for i, letter in enumerate(AMINO_ACIDS)}
    result: dict[str, Any] = {"assays": {}, "higher_is_better": True}
    for name, (sequence, mutants, scores) in read_assays(folder).items():
        place = torch.tensor([p for p, _ in mutants]), torch.tensor([columns[a] for _, a in mutants])
        result["assays"][name] = {"mutants": len(scores)} | {
            label: float(scipy.stats.spearmanr(mutation_scores(architecture, model, sequence)[place], scores).statistic)
            for label, model in models.items()
        }
    for label in models:
        result[f"mean_spearman_{label}"] = float(np.mean([a[label] for a in result["assays"].values()]))
    return result


def cost(
    architecture: Architecture, dense: nn.Module, small: nn.Module, batch: Batch, rounds: int = 10
) -> dict[str, Any]:
    """Bytes in memory and milliseconds per forward pass, timed in turn; the time depends on the machine."""
    run = architecture.logits if architecture.has_logits else architecture.hidden
    samples = []
    with evaluating(dense), evaluating(small), torch.inference_mode():
        for _ in range(rounds + 1):
            pair = []
            for model in (dense, small):
                start = time.perf_counter_ns()
                run(model, batch)
                pair.append((time.perf_counter_ns() - start) / 1e6)
            samples.append(pair)
    times = np.array(samples[1:])
    ratios = np.percentile(times[:, 0] / times[:, 1], [25, 50, 75])
    tokens = tokens_of(batch)
    return {
        "bytes_before": module_bytes(dense),
        "bytes_after": module_bytes(small),
        "batch": list(tokens.shape) if tokens is not None else None,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "before_ms": float(np.median(times[:, 0])),
        "after_ms": float(np.median(times[:, 1])),
        "speedup": {
            "median": float(ratios[1]),
            "q25": float(ratios[0]),
            "q75": float(ratios[2]),
            "higher_is_better": True,
        },
    }
