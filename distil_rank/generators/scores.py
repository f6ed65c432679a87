"""One pass of a model over held-out proteins: everything the metrics need, per protein and per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.generators.calibration import best_temperature, calibration, ratio_interval, ratio_of_sums
from distil_rank.generators.data import Encoded
from distil_rank.generators.fit import Precision, Teacher, autocast
from distil_rank.generators.loss import Objective, TopTargets, distillation_sums, predictions
from distil_rank.core.records import interval

Array = NDArray[np.float64]
TEMPERATURES = np.geomspace(0.5, 2.0, 13)  # tried for temperature scaling


@dataclass(frozen=True)
class Scores:
    """Sums per protein (n,), in nats, and the most probable token's calibration at every predicted token (m,)."""

    nll: Array
    predictions: Array
    residues: Array
    kl: Array | None  # of the teacher from the model, at temperature 1
    scaled_nll: Array  # at each of TEMPERATURES (n, 13)
    confidence: Array
    correct: Array
    brier: Array
    protein: NDArray[np.int64]


@torch.no_grad()
def score(
    model: Any,
    proteins: Encoded,
    teacher: Teacher | None = None,
    temperature: float = 1.0,
    precision: Precision = "fp32",
    batch_size: int = 32,
    scaling: bool = True,
) -> Scores:
    """Scores of a model whose logits are divided by `temperature`; without `scaling`, `scaled_nll` stays 0."""
    model.eval()
    device, n = next(model.parameters()).device, len(proteins)
    nll, kl, scaled = np.zeros(n), np.zeros(n), np.zeros((n, len(TEMPERATURES)))
    confidence, correct, brier, protein = [], [], [], []
    for batch in proteins.in_order_of_length(batch_size):
        tokens, mask = (x.to(device) for x in proteins.batch(batch))
        with autocast(device, precision):
            logits = model(input_ids=tokens, use_cache=False).logits
        logits = logits.float() / temperature
        targets = None if teacher is None else teacher.targets(batch, tokens, mask)
        counted = predictions(mask)
        for row, i in enumerate(batch):
            here = counted[row]
            z, y = logits[row, :-1][here], tokens[row, 1:][here]
            log_q = torch.log_softmax(z, -1)
            nll[i] = -float(log_q.gather(1, y[:, None]).sum(dtype=torch.float64))
            for j, tau in enumerate(TEMPERATURES if scaling else ()):
                scaled[i, j] = float(torch.nn.functional.cross_entropy(z / float(tau), y, reduction="sum"))
            top, guess = log_q.max(-1)
            q = log_q.exp()
            confidence.append(top.exp().double().cpu().numpy())
            correct.append((guess == y).double().cpu().numpy())
            brier.append((q.square().sum(-1) - 2 * q.gather(1, y[:, None])[:, 0] + 1).double().cpu().numpy())
            protein.append(np.full(len(y), i))
            if targets is not None:
                one = slice(row, row + 1)
                own = targets[one] if isinstance(targets, Tensor) else TopTargets(*(t[one] for t in targets))
                sums = distillation_sums(logits[one], own, tokens[one], mask[one], Objective(1.0, 0.0))
                kl[i] = float(sums.soft)
    return Scores(
        nll,
        (proteins.lengths - 1).astype(float),
        proteins.residues.astype(float),
        None if teacher is None else kl,
        scaled,
        np.concatenate(confidence),
        np.concatenate(correct),
        np.concatenate(brier),
        np.concatenate(protein),
    )


def perplexity(scores: Scores) -> dict[str, Any]:
    """exp of the mean negative log-likelihood per predicted token, interval over proteins."""
    return exponential(*ratio_of_sums(scores.nll, scores.predictions, np.arange(len(scores.nll))))


def bits_per_residue(scores: Scores) -> dict[str, Any]:
    """Bits of the whole text (line breaks and end included) per residue: does not depend on the tokenisation."""
    bits = scores.nll / np.log(2)
    return ratio_interval(bits, scores.residues, np.arange(len(bits)))


def perplexity_ratio(student: Scores, teacher: Scores) -> dict[str, Any]:
    """Student's perplexity over the teacher's on the same proteins, paired."""
    difference = student.nll - teacher.nll
    return exponential(*ratio_of_sums(difference, student.predictions, np.arange(len(difference))))


def divergence_from_teacher(student: Scores) -> dict[str, Any]:
    """Mean KL(teacher || student) per predicted token, in nats."""
    assert student.kl is not None
    return ratio_interval(student.kl, student.predictions, np.arange(len(student.kl)))


def calibration_with_control(
    model: Any, proteins: Encoded, scores: Scores, seed: int = 0, **how: Any
) -> dict[str, Any]:
    """Calibration as it is, and after temperature scaling fitted on one half of the proteins and measured on the
    other."""
    even = np.arange(len(proteins)) % 2 == 0
    temperature = best_temperature(TEMPERATURES, scores.scaled_nll[even].sum(0))
    scaled = score(model, proteins.take(np.flatnonzero(~even)), temperature=temperature, **how)
    there = ~even[scores.protein]
    return {
        "as_is": calibration(scores.confidence, scores.correct, scores.brier, scores.protein, seed),
        "as_is_other_half": calibration(
            scores.confidence[there], scores.correct[there], scores.brier[there], scores.protein[there], seed
        ),
        "temperature_scaled": calibration(scaled.confidence, scaled.correct, scaled.brier, scaled.protein, seed),
        "fitted_temperature": temperature,
    }


def exponential(value: float, low: float, high: float) -> dict[str, Any]:
    """exp of a value and its interval, as records hold them, for a loss."""
    return interval(float(np.exp(value)), float(np.exp(low)), float(np.exp(high)), higher_is_better=False)
