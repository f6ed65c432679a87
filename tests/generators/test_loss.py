"""The distillation objective: equal to references by hand, blind to padding and micro-batches."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from benchmarks.generators import direct
from distil_rank.core.errors import InputError
from distil_rank.generators.loss import (
    Hidden,
    Objective,
    distillation_sums,
    entropy,
    position_weights,
    predictions,
)
from tests.generators.reference import objective_by_hand

VARIANTS = [
    {"uncertainty": u, "calibration": c} for u, c in itertools.product((False, True), repeat=2)
]
variants = pytest.mark.parametrize("variant", VARIANTS)


def batch(seed=0, b=4, length=9, v=13, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(b, length, v, generator=g, dtype=dtype).requires_grad_()
    teacher = 2 * torch.randn(b, length, v, generator=g, dtype=dtype)
    tokens = torch.randint(v, (b, length), generator=g)
    mask = torch.ones(b, length, dtype=torch.long)
    for row in range(1, b):
        mask[row, length - row :] = 0
    return student, teacher, tokens, mask


def mean_loss(student, teacher, tokens, mask, objective):
    sums = distillation_sums(student, teacher, tokens, mask, objective)
    return sums.loss / sums.n


def with_gradient(loss, student):
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def slope(value, student, place, step=1e-5):
    """Central difference."""
    shift = torch.zeros_like(student)
    shift[place] = step
    with torch.no_grad():
        return float(value(student + shift) - value(student - shift)) / (2 * step)


@variants
@pytest.mark.parametrize("tau,alpha", [(1.0, 0.5), (2.0, 0.1), (4.0, 0.0), (2.0, 1.0)])
def test_value_and_gradient_equal_the_formula_written_out(variant, tau, alpha):
    student, *rest = batch()

    def by_hand(z):
        return objective_by_hand(z, *rest, tau=tau, alpha=alpha, smoothing=0.3, **variant)

    loss = mean_loss(student, *rest, Objective(tau, alpha, smoothing=0.3, **variant))
    value, gradient = with_gradient(loss, student)
    assert float(value) == pytest.approx(by_hand(student), rel=1e-10)
    for place in [(0, 0, 3), (1, 5, 7), (2, 2, 0), (0, 8, 1), (3, 6, 2)]:  # the last two are zero
        assert float(gradient[place]) == pytest.approx(slope(by_hand, student, place), abs=1e-8)


def test_the_plain_case_equals_trl_s_own_function():
    """TRL 1.16 keeps it in the trainer of GKD; labels are those of the predictions."""
    place = "trl.experimental.gkd.gkd_trainer"
    gkd = pytest.importorskip(place, reason="needs TRL: pip install trl", exc_type=ImportError)
    student, teacher, tokens, mask = batch()
    counted = predictions(mask)
    expected = 9 * gkd.GKDTrainer.generalized_jsd_loss(
        student[:, :-1],
        teacher[:, :-1],
        tokens[:, 1:].masked_fill(~counted, -100),
        beta=0,
        temperature=3.0,
        num_items_in_batch=int(counted.sum()),
    )
    found = mean_loss(student, teacher, tokens, mask, Objective(3.0, 0.0))
    assert_close(with_gradient(found, student), with_gradient(expected, student))


@variants
def test_eight_by_one_equals_two_by_four(variant):
    student, *rest = batch(b=8, length=12)
    total = int(predictions(rest[-1]).sum())
    gradients = []
    for size in (8, 2, 1):
        student.grad = None
        for part in torch.arange(8).split(size):
            given = (x[part] for x in (student, *rest))
            (distillation_sums(*given, Objective(**variant)).loss / total).backward()
        gradients.append(student.grad.clone())
    for gradient in gradients[1:]:
        assert_close(gradient, gradients[0], rtol=0, atol=1e-12)


@variants
@pytest.mark.parametrize("left,right", [(3, 0), (0, 3), (2, 5)])
def test_padding_changes_nothing(variant, left, right):
    student, teacher, tokens, mask = batch(dtype=torch.float32)
    objective = Objective(**variant)
    plain = mean_loss(student, teacher, tokens, mask, objective)
    logits = (F.pad(x, (0, 0, left, right), value=7.0) for x in (student, teacher))
    tokens, mask = F.pad(tokens, (left, right), value=5), F.pad(mask, (left, right))
    padded = mean_loss(*logits, tokens, mask, objective)
    found, wanted = with_gradient(padded, student), with_gradient(plain, student)
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_end_token_counts_also_when_it_is_the_padding_token():
    student, teacher, _, _ = batch(b=1, length=6)
    tokens = torch.tensor([[0, 5, 6, 0, 0, 0]])  # 0 begins, ends and pads
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    sums = distillation_sums(student, teacher, tokens, mask, Objective(alpha=1.0))
    expected = F.cross_entropy(student[0, :3], torch.tensor([5, 6, 0]), reduction="sum")
    assert sums.n == 3
    assert_close(sums.loss, expected)


def test_weights_lie_between_a_half_and_one():
    entropies, counted = torch.rand(5, 30, dtype=torch.float64), torch.rand(5, 30) > 0.4
    plain = position_weights(entropies, counted, counted)
    assert plain[counted].min() == 0.5 and plain[counted].max() == 1.0 and not plain[~counted].any()
    empty = torch.tensor([[True, True], [False, False]])  # flat entropies, and nothing counted
    assert position_weights(torch.ones(2, 2), empty, empty).tolist() == [[0.5, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@variants
def test_half_precision_stays_finite_at_extreme_logits(dtype, variant):
    student = [[[3e4, -3e4, 0.0], [0.0, 1.0, -6e4], [1.0, 1.0, 1.0]]]
    teacher = [[[-3e4, 3e4, 0.0], [5e4, -5e4, 0.0], [1.0, 1.0, 1.0]]]
    student = torch.tensor(student, dtype=dtype, requires_grad=True)
    given = (torch.tensor(teacher, dtype=dtype), torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    found = with_gradient(mean_loss(student, *given, Objective(**variant)), student)
    assert all(torch.isfinite(part).all() for part in found)


def test_large_vocabulary_equals_the_direct_formula():
    student, teacher, tokens, mask = batch(b=2, length=6, v=50257, dtype=torch.float32)
    found = mean_loss(student, teacher, tokens, torch.ones_like(mask), Objective()).float()
    wanted = direct(student, teacher, tokens)
    given = {"rtol": 1e-5, "atol": 1e-5}
    assert_close(with_gradient(found, student), with_gradient(wanted, student), **given)


@variants
def test_states_and_head_give_the_loss_and_the_gradients_of_their_logits(variant):
    objective, (_, _, tokens, mask) = Objective(**variant), batch(v=30)
    g = torch.Generator().manual_seed(1)
    shapes = ((4, 9, 6), (30, 6), (4, 9, 8), (30, 8))
    h, w, h_t, w_t = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    h.requires_grad_(), w.requires_grad_()
    found = mean_loss(Hidden(h, w), Hidden(h_t, w_t), tokens, mask, objective)
    wanted = mean_loss(h @ w.T, h_t @ w_t.T, tokens, mask, objective)
    assert_close(found, wanted)
    assert_close(torch.autograd.grad(found, (h, w)), torch.autograd.grad(wanted, (h, w)))


def test_line_breaks_and_ends_set_no_extreme_of_the_weights():
    student, teacher, tokens, mask = batch(v=20)
    teacher[:, ::3] *= 20  # these predictions are certain, and of a token without a residue
    tokens = tokens.clamp_min(2)
    tokens[:, 1::3] = 1
    targets = tokens[:, 1:]
    entropies, counted = entropy(teacher.flatten(0, 1)).view(4, 9)[:, :-1], predictions(mask)
    residues = counted & (targets != 1)
    weights = position_weights(entropies, counted, residues=residues)
    for row in range(4):
        own = entropies[row][residues[row]]
        expected = 0.5 + 0.5 * (own - own.min()) / (own.max() - own.min())
        assert_close(weights[row][residues[row]], expected)
        assert (weights[row][counted[row] & ~residues[row]] == 0.5).all()
    objective = Objective(2.0, 0.0, uncertainty=True)
    found = distillation_sums(student, teacher, tokens, mask, objective, layout=(0, 1))
    plain = F.kl_div(
        *(F.log_softmax(z[:, :-1] / 2, -1) for z in (student, teacher)),
        reduction="none",
        log_target=True,
    )
    assert_close(found.loss, 4 * (plain.sum(-1) * weights).sum())


def test_a_second_backward_pass_is_an_error_not_a_wrong_gradient():
    loss = mean_loss(*batch(), Objective())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        loss.backward()


def test_different_vocabularies_are_refused():
    student, teacher, tokens, mask = batch()
    with pytest.raises(InputError, match="one vocabulary"):
        distillation_sums(student, teacher[..., :5], tokens, mask, Objective())
