"""How likely a generator finds held-out proteins: perplexity, bits, divergence, calibration.

One pass of the model gives `Scores`; every metric is a function of them.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distil_rank.core.intervals import ratio_interval
from distil_rank.core.records import Metric, interval
from distil_rank.generators.data import Encoded
from distil_rank.generators.loss import Hidden, Objective, distillation_sums, predictions
from distil_rank.generators.models import Dtype, autocast
from distil_rank.generators.teachers import Teacher

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Sums per protein (n,), in nats, and the most probable token's calibration at each of m."""

    nll: Array
    predictions: Array
    residues: Array
    kl: Array | None  # of the teacher from the model, at temperature 1
    confidence: Array  # (m,), as the two below
    correct: Array
    protein: NDArray[np.int64]


@torch.no_grad()
def score(
    model: Any,
    proteins: Encoded,
    teacher: Teacher | None = None,
    dtype: Dtype = "float32",
) -> Scores:
    """Scores of a model, with the divergence from `teacher` where one is given."""
    model.eval()
    device, n = next(model.parameters()).device, len(proteins)
    nll, kl = np.zeros(n), np.zeros(n)
    tokenwise: list[tuple[Any, ...]] = []  # confidence, correct, protein
    for batch in proteins.in_order_of_length():
        tokens, mask = (x.to(device) for x in proteins.batch(batch))
        with autocast(device, dtype):
            logits = model(input_ids=tokens, use_cache=False).logits
        logits = logits.float()
        targets = None if teacher is None else teacher.targets(batch, tokens, mask)
        counted = predictions(mask)
        for row, i in enumerate(batch):
            z, y = logits[row, :-1][counted[row]], tokens[row, 1:][counted[row]]
            log_q = torch.log_softmax(z, -1)
            nll[i] = -float(log_q.gather(1, y[:, None]).sum(dtype=torch.float64))
            top, guess = log_q.max(-1)
            found = (top.exp().double().cpu().numpy(), (guess == y).double().cpu().numpy())
            tokenwise.append((*found, np.full(len(y), i)))
            if targets is not None:
                own = slice(row, row + 1)
                given = Hidden(targets.states[own], targets.weight)
                plain = Objective(temperature=1.0, alpha=0.0)
                kl[i] = distillation_sums(logits[own], given, tokens[own], mask[own], plain).soft
    confidence, correct, protein = (np.concatenate(part) for part in zip(*tokenwise))
    return Scores(
        nll,
        (proteins.lengths - 1).astype(float),
        proteins.residues.astype(float),
        None if teacher is None else kl,
        confidence,
        correct,
        protein,
    )


def perplexity(scores: Scores) -> Metric:
    """exp of the mean negative log-likelihood per predicted token, interval over proteins."""
    value, low, high = np.exp(_over_proteins(scores.nll, scores.predictions)).tolist()
    return interval(value, low, high, False)


def perplexity_ratio(student: Scores, teacher: Scores) -> Metric:
    """Student's perplexity over the teacher's on the same proteins, paired."""
    return perplexity(replace(student, nll=student.nll - teacher.nll))


def bits_per_residue(scores: Scores) -> Metric:
    """Bits of the whole text (line breaks and end included) per residue: for any tokenizer."""
    return interval(*_over_proteins(scores.nll / np.log(2), scores.residues), False)


def divergence_from_teacher(student: Scores) -> Metric:
    """Mean KL(teacher || student) per predicted token, in nats."""
    assert student.kl is not None
    return interval(*_over_proteins(student.kl, student.predictions), False)


def _over_proteins(sums: Array, sizes: Array) -> tuple[float, float, float]:
    return ratio_interval(sums, sizes, np.arange(len(sums)))
