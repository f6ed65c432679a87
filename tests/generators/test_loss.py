"""The distillation objective: equal to references by hand, blind to padding and to micro-batches."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from distil_rank.core.errors import InputError
from distil_rank.generators.loss import (
    Objective,
    distillation_sums,
    entropy,
    position_weights,
    predictions,
    published_loss,
    top_targets,
)
from tests.generators.reference import objective_by_hand, objective_direct

VARIANTS = [
    {"uncertainty": u, "calibration": c, "normalise_weights": n}
    for u, c, n in itertools.product((False, True), repeat=3)
    if u or not n
]


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tau,alpha", [(1.0, 0.5), (2.0, 0.1), (4.0, 0.0), (2.0, 1.0)])
def test_value_and_gradient_equal_the_formula_written_out(variant, tau, alpha):
    student, teacher, tokens, mask = batch()
    objective = Objective(tau, alpha, smoothing=0.3, **variant)
    loss = mean_loss(student, teacher, tokens, mask, objective)
    hand = (
        tau,
        alpha,
        variant["uncertainty"],
        variant["calibration"],
        0.3,
        variant["normalise_weights"],
    )
    assert loss.item() == pytest.approx(
        objective_by_hand(student, teacher, tokens, mask, *hand), rel=1e-10
    )
    loss.backward()
    for place in [
        (0, 0, 3),
        (1, 5, 7),
        (2, 2, 0),
        (0, 8, 1),
        (3, 6, 2),
    ]:  # central differences; the last two are zero
        shift = torch.zeros_like(student)
        shift[place] = 1e-5
        up, down = (
            objective_by_hand(student + s, teacher, tokens, mask, *hand) for s in (shift, -shift)
        )
        assert float(student.grad[place]) == pytest.approx((up - down) / 2e-5, abs=1e-8)


def test_the_plain_case_equals_torch_kl_div():
    student, teacher, tokens, _ = batch()
    mask = torch.ones_like(tokens)
    loss = mean_loss(student, teacher, tokens, mask, Objective(2.0, 0.0))
    log_p, log_q = (F.log_softmax(z[:, :-1].flatten(0, 1) / 2, dim=-1) for z in (teacher, student))
    expected = 4 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, expected)
    found, wanted = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0]
    torch.testing.assert_close(found, wanted)


def test_the_plain_case_equals_forward_kl_as_trl_defines_it():
    """TRL's generalized_jsd_loss, beta = 0: forward KL of softened distributions over the mask."""
    student, teacher, tokens, mask = batch()
    counted = predictions(mask)
    log_p, log_q = (F.log_softmax(z[:, :-1] / 3, dim=-1) for z in (teacher, student))
    expected = (
        F.kl_div(log_q, log_p, reduction="none", log_target=True)[counted].sum() / counted.sum()
    )
    torch.testing.assert_close(
        mean_loss(student, teacher, tokens, mask, Objective(3.0, 0.0)), 9 * expected
    )


def test_the_plain_case_equals_trl_s_own_function():
    """TRL 1.16 keeps it in the trainer of GKD; labels are those of the predictions."""
    place = "trl.experimental.gkd.gkd_trainer"
    gkd = pytest.importorskip(place, reason="needs TRL: pip install trl", exc_type=ImportError)
    student, teacher, tokens, mask = batch()
    labels = tokens[:, 1:].masked_fill(~predictions(mask), -100)
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        student[:, :-1],
        teacher[:, :-1],
        labels,
        beta=0,
        temperature=3.0,
        num_items_in_batch=int(predictions(mask).sum()),
    )
    found = mean_loss(student, teacher, tokens, mask, Objective(3.0, 0.0))
    torch.testing.assert_close(found, 9 * expected)
    gradients = (torch.autograd.grad(value, student)[0] for value in (found, 9 * expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_by_one_equals_two_by_four(variant):
    student, teacher, tokens, mask = batch(b=8, length=12)
    objective = Objective(**variant)
    total = int(predictions(mask).sum())
    gradients = []
    for size in (8, 2, 1):
        student.grad = None
        for part in torch.arange(8).split(size):
            sums = distillation_sums(
                student[part], teacher[part], tokens[part], mask[part], objective
            )
            (sums.loss / total).backward()
        gradients.append(student.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("left,right", [(3, 0), (0, 3), (2, 5)])
def test_padding_changes_nothing(variant, left, right):
    student, teacher, tokens, mask = batch(dtype=torch.float32)
    objective = Objective(**variant)
    plain = mean_loss(student, teacher, tokens, mask, objective)
    wanted = torch.autograd.grad(plain, student)[0]
    wide, wide_teacher = (F.pad(x, (0, 0, left, right), value=7.0) for x in (student, teacher))
    padded = mean_loss(
        wide,
        wide_teacher,
        F.pad(tokens, (left, right), value=5),
        F.pad(mask, (left, right)),
        objective,
    )
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(padded, student)[0], wanted, rtol=1e-6, atol=1e-6
    )


def test_end_token_counts_also_when_it_is_the_padding_token():
    student, teacher, _, _ = batch(b=1, length=6)
    tokens = torch.tensor([[0, 5, 6, 0, 0, 0]])  # 0 begins, ends and pads
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    sums = distillation_sums(student, teacher, tokens, mask, Objective(alpha=1.0))
    expected = F.cross_entropy(student[0, :3], torch.tensor([5, 6, 0]), reduction="sum")
    assert sums.n == 3
    torch.testing.assert_close(sums.loss, expected)


def test_normalised_weights_have_mean_one():
    entropies = torch.rand(5, 30, dtype=torch.float64)
    counted = torch.rand(5, 30) > 0.4
    weights = position_weights(entropies, counted, normalise=True)
    torch.testing.assert_close(
        weights.sum(-1) / counted.sum(-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6
    )
    plain = position_weights(entropies, counted)
    assert plain[counted].min() == 0.5 and plain[counted].max() == 1.0 and not plain[~counted].any()


def test_flat_entropies_and_empty_sequences_get_finite_weights():
    counted = torch.tensor([[True, True], [False, False]])
    weights = position_weights(torch.ones(2, 2), counted, normalise=True)
    assert weights.tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_stays_finite_at_extreme_logits(dtype, variant):
    student = torch.tensor(
        [[[3e4, -3e4, 0.0], [0.0, 1.0, -6e4], [1.0, 1.0, 1.0]]], dtype=dtype
    ).requires_grad_()
    teacher = torch.tensor([[[-3e4, 3e4, 0.0], [5e4, -5e4, 0.0], [1.0, 1.0, 1.0]]], dtype=dtype)
    loss = mean_loss(
        student, teacher, torch.tensor([[0, 1, 2]]), torch.ones(1, 3), Objective(**variant)
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_published_formula_agrees_where_it_should_and_differs_where_it_is_known_to():
    student, teacher, tokens, mask = batch()
    for variant in VARIANTS:
        if not variant["normalise_weights"]:
            objective = Objective(**variant)
            labels = tokens.masked_fill(mask == 0, -100)
            published = published_loss(student, teacher, labels, mask, objective)
            torch.testing.assert_close(
                published,
                mean_loss(student, teacher, tokens, mask, objective),
                rtol=1e-6,
                atol=1e-6,
            )
    # per-call means: the split into micro-batches changes the published value
    labels = tokens.masked_fill(mask == 0, -100)
    whole = published_loss(student, teacher, labels, mask, Objective())
    parts = [
        published_loss(
            student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], mask[i : i + 1], Objective()
        )
        for i in range(4)
    ]
    assert abs(whole.item() - sum(parts).item() / 4) > 1e-4
    # a left-padded sequence: the first real token is predicted from padding and counted
    left = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1]])
    found = published_loss(student[:1], teacher[:1], tokens[:1], left, Objective(alpha=0.0))
    assert (
        abs(
            found.item()
            - float(mean_loss(student[:1], teacher[:1], tokens[:1], left, Objective(alpha=0.0)))
        )
        > 1e-4
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_top_k_targets_with_all_tokens_are_exact_and_never_above_the_divergence(variant):
    student, teacher, tokens, mask = batch(v=20)
    objective = Objective(2.0, 0.0, **variant)
    exact = mean_loss(student, teacher, tokens, mask, objective)
    wanted = torch.autograd.grad(exact, student)[0]
    previous = 0.0
    for k in (1, 5, 19, 20):
        flat = top_targets(teacher.flatten(0, 1), k, 2.0)
        top = type(flat)(*(part.unflatten(0, teacher.shape[:2]) for part in flat))
        loss = mean_loss(student, top, tokens, mask, objective)
        assert (
            previous - 1e-12 <= float(loss) <= float(exact) + 1e-12
        )  # finer outcomes, more divergence
        previous = float(loss)
        found = torch.autograd.grad(loss, student)[0]
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(found, wanted)


def test_top_k_gradient_is_the_gradient_of_its_value():
    student, teacher, tokens, mask = batch(b=1, length=3, v=9)
    flat = top_targets(teacher.flatten(0, 1), 3, 2.0)
    top = type(flat)(*(part.unflatten(0, teacher.shape[:2]) for part in flat))
    objective = Objective(2.0, 0.0, calibration=True)

    def value(z):
        return float(mean_loss(z, top, tokens, mask, objective))

    found = torch.autograd.grad(mean_loss(student, top, tokens, mask, objective), student)[0]
    for v in range(9):
        shift = torch.zeros_like(student)
        shift[0, 1, v] = 1e-6
        assert float(found[0, 1, v]) == pytest.approx(
            (value(student + shift) - value(student - shift)) / 2e-6, abs=1e-7
        )


def test_entropy_of_known_distributions():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(entropy(logits), torch.tensor([4.0, 1.0]).log())


def test_large_vocabulary_equals_the_direct_formula():
    student, teacher, tokens, mask = batch(b=2, length=6, v=50257, dtype=torch.float32)
    mask = torch.ones_like(mask)
    found = mean_loss(student, teacher, tokens, mask, Objective())
    wanted = objective_direct(student, teacher, tokens, 2.0, 0.5)
    torch.testing.assert_close(found.float(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0],
        torch.autograd.grad(wanted, student)[0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_second_backward_pass_is_an_error_not_a_wrong_gradient():
    student, teacher, tokens, mask = batch()
    loss = mean_loss(student, teacher, tokens, mask, Objective())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        loss.backward()


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"temperature": -1.0}, {"alpha": 1.5}, {"smoothing": -0.1}]
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Objective(**bad).check()


def test_different_vocabularies_are_refused():
    student, teacher, tokens, mask = batch()
    with pytest.raises(InputError, match="one vocabulary"):
        distillation_sums(student, teacher[..., :5], tokens, mask, Objective())
