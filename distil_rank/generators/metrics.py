"""How likely a generator finds held-out proteins: perplexity, bits, divergence, calibration.

One pass of the model gives `Scores`; every metric is a function of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.core.intervals import ratio_interval
from distil_rank.core.records import Metric, Record, interval
from distil_rank.generators.calibration import best_temperature, calibration
from distil_rank.generators.data import Encoded
from distil_rank.generators.loss import (
    Hidden,
    Objective,
    TopTargets,
    distillation_sums,
    predictions,
)
from distil_rank.generators.models import Dtype, autocast
from distil_rank.generators.teachers import Teacher

Array = NDArray[np.float64]
TEMPERATURES = np.geomspace(0.5, 2.0, 13)  # tried for temperature scaling


@dataclass(frozen=True)
class Scores:
    """Sums per protein (n,), in nats, and the most probable token's calibration at each of m."""

    nll: Array
    predictions: Array
    residues: Array
    kl: Array | None  # of the teacher from the model, at temperature 1
    scaled_nll: Array  # at each of TEMPERATURES (n, 13)
    confidence: Array  # (m,), as the three below
    correct: Array
    brier: Array
    protein: NDArray[np.int64]


@torch.no_grad()
def score(
    model: Any,
    proteins: Encoded,
    teacher: Teacher | None = None,
    temperature: float = 1.0,
    dtype: Dtype = "float32",
    batch_size: int = 32,
    scaling: bool = True,
) -> Scores:
    """Scores of a model whose logits are divided by `temperature`.

    Without `scaling`, `scaled_nll` stays 0.
    """
    model.eval()
    device, n = next(model.parameters()).device, len(proteins)
    nll, kl, scaled = np.zeros(n), np.zeros(n), np.zeros((n, len(TEMPERATURES)))
    tokenwise: list[tuple[Array, ...]] = []  # confidence, correct, Brier score, protein
    for batch in proteins.in_order_of_length(batch_size):
        tokens, mask = (x.to(device) for x in proteins.batch(batch))
        with autocast(device, dtype):
            logits = model(input_ids=tokens, use_cache=False).logits
        logits = logits.float() / temperature
        targets = None if teacher is None else teacher.targets(batch, tokens, mask)
        counted = predictions(mask)
        for row, i in enumerate(batch):
            z, y = logits[row, :-1][counted[row]], tokens[row, 1:][counted[row]]
            log_q = torch.log_softmax(z, -1)
            nll[i] = -float(log_q.gather(1, y[:, None]).sum(dtype=torch.float64))
            for j, tau in enumerate(TEMPERATURES if scaling else ()):
                scaled[i, j] = torch.nn.functional.cross_entropy(z / float(tau), y, reduction="sum")
            tokenwise.append((*_most_probable(log_q, y), np.full(len(y), i)))
            if targets is not None:
                own = slice(row, row + 1)
                kl[i] = _divergence(targets, own, logits[own], tokens[own], mask[own])
    confidence, correct, brier, protein = (np.concatenate(part) for part in zip(*tokenwise))
    return Scores(
        nll,
        (proteins.lengths - 1).astype(float),
        proteins.residues.astype(float),
        None if teacher is None else kl,
        scaled,
        confidence,
        correct,
        brier,
        protein,
    )


def _most_probable(log_q: Tensor, y: Tensor) -> tuple[Array, Array, Array]:
    """Confidence, whether it is right, and Brier score of the most probable token (l,)."""
    top, guess = log_q.max(-1)
    q = log_q.exp()
    brier = q.square().sum(-1) - 2 * q.gather(1, y[:, None])[:, 0] + 1
    confidence, correct, brier = (x.double().cpu() for x in (top.exp(), guess == y, brier))
    return confidence.numpy(), correct.numpy(), brier.numpy()


def _divergence(
    targets: Hidden | TopTargets, own: slice, logits: Tensor, tokens: Tensor, mask: Tensor
) -> float:
    """KL of the teacher from the model, summed over one protein, in nats."""
    if isinstance(targets, Hidden):
        given: Hidden | TopTargets = Hidden(targets.states[own], targets.weight)
    else:
        given = TopTargets(*(part[own] for part in targets))
    return float(distillation_sums(logits, given, tokens, mask, Objective(1.0, 0.0)).soft)


def perplexity(scores: Scores) -> Metric:
    """exp of the mean negative log-likelihood per predicted token, interval over proteins."""
    return _exponential(_over_proteins(scores.nll, scores.predictions))


def perplexity_ratio(student: Scores, teacher: Scores) -> Metric:
    """Student's perplexity over the teacher's on the same proteins, paired."""
    return _exponential(_over_proteins(student.nll - teacher.nll, student.predictions))


def bits_per_residue(scores: Scores) -> Metric:
    """Bits of the whole text (line breaks and end included) per residue: for any tokenizer."""
    return interval(*_over_proteins(scores.nll / np.log(2), scores.residues), False)


def divergence_from_teacher(student: Scores) -> Metric:
    """Mean KL(teacher || student) per predicted token, in nats."""
    assert student.kl is not None
    return interval(*_over_proteins(student.kl, student.predictions), False)


def _over_proteins(sums: Array, sizes: Array) -> tuple[float, float, float]:
    return ratio_interval(sums, sizes, np.arange(len(sums)))


def _exponential(bounds: tuple[float, float, float]) -> Metric:
    value, low, high = np.exp(bounds).tolist()
    return interval(value, low, high, higher_is_better=False)


def calibration_with_control(
    model: Any, proteins: Encoded, scores: Scores, seed: int = 0, dtype: Dtype = "float32"
) -> Record:
    """Calibration as it is, and after temperature scaling.

    The temperature is fitted on one half of the proteins and measured on the other.
    """
    even = np.arange(len(proteins)) % 2 == 0
    temperature = best_temperature(TEMPERATURES, scores.scaled_nll[even].sum(0))
    other = proteins.take(np.flatnonzero(~even))
    scaled = score(model, other, temperature=temperature, dtype=dtype)

    def measured(s: Scores, there: Any = slice(None)) -> Record:
        parts = (s.confidence[there], s.correct[there], s.brier[there], s.protein[there])
        return calibration(*parts, seed)

    return {
        "as_is": measured(scores),
        "as_is_other_half": measured(scores, ~even[scores.protein]),
        "temperature_scaled": measured(scaled),
        "fitted_temperature": temperature,
    }
