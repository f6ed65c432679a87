"""Training: one gradient for every split of a batch, exact resumption, caches without effect."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from distil_rank.core.devices import threads
from distil_rank.core.errors import InputError
from distil_rank.generators.loss import Objective, distillation_sums
from distil_rank.generators.models import fresh, initial_student
from distil_rank.generators.teachers import Cache, Live, read
from distil_rank.generators.train import Schedule, fit, mean_nll

SCHEDULE = Schedule(steps=6, batch_size=8, learning_rate=3e-3, seed=5)


def student(seed=0):
    return fresh(27, 2, 2, 16, 128, 0, seed)


def state(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(proteins, teacher, schedule=SCHEDULE, objective=None, **more):
    model, log = student(), []
    objective = objective or Objective()
    fit(model, proteins, None, teacher, objective, schedule, report=log.append, **more)
    return state(model), [entry["loss"] for entry in log]


def test_losses_fall_and_two_runs_are_bit_equal(proteins, teacher):
    long = replace(SCHEDULE, steps=25)
    first, losses = trained(proteins, Live(teacher), long, Objective(alpha=0.0))
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(first, trained(proteins, Live(teacher), long, Objective(alpha=0.0))[0])


@pytest.mark.parametrize("enhanced", [False, True])
def test_accumulation_changes_nothing(proteins, teacher, enhanced):
    objective = Objective(uncertainty=enhanced, calibration=enhanced)
    whole, losses = trained(proteins, Live(teacher), objective=objective)
    for accumulation in (4, 8):
        schedule = replace(SCHEDULE, accumulation=accumulation)
        parts, again = trained(proteins, Live(teacher), schedule, objective)
        np.testing.assert_allclose(again, losses, rtol=1e-5)
        torch.testing.assert_close(parts, whole, rtol=0, atol=2e-4)


def test_checkpointing_computes_the_same_gradients_with_fewer_activations(proteins, teacher):
    found = [
        trained(proteins, Live(teacher), replace(SCHEDULE, gradient_checkpointing=on))
        for on in (False, True)
    ]
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler for torch.compile")
def test_a_compiled_student_learns_the_same(proteins, teacher):
    plain, losses = trained(proteins, Live(teacher))
    compiled, again = trained(proteins, Live(teacher), replace(SCHEDULE, compile=True))
    np.testing.assert_allclose(again, losses, rtol=1e-4)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-3)


def test_exact_cache_gives_the_losses_of_the_live_teacher(proteins, teacher):
    objective = Objective(uncertainty=True, calibration=True)
    with threads(1):  # with more, sums may be taken in another order for another batch
        live, losses = trained(proteins, Live(teacher), objective=objective)
        cache = Cache(teacher, proteins)
        cached, again = trained(proteins, cache, objective=objective)
    assert again == losses
    assert torch.equal(cached, live)


def test_a_large_vocabulary_is_never_written_out_and_changes_nothing(proteins):
    """At V > width states are kept, and logits made a few rows at a time."""
    teacher, model = fresh(27, 2, 2, 16, 128, 0, 1).eval(), fresh(27, 1, 2, 16, 128, 0, 2)
    objective, place, wanted = Objective(uncertainty=True), np.arange(5), None
    tokens, mask = proteins.batch(place)
    source = Live(teacher).targets(place, tokens, mask)
    assert source.states.shape[-1] == 16 and source.weight is teacher.lm_head.weight
    logits = (m(input_ids=tokens).logits for m in (model, teacher))
    for given in ((read(model, tokens), source), logits):
        found = distillation_sums(*given, tokens, mask, objective).loss
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(found, model.parameters())])
        wanted = wanted or (found, gradient)
    torch.testing.assert_close((found, gradient), wanted, rtol=1e-4, atol=1e-4)
    assert Cache(teacher, proteins).kept.shape == (proteins.offsets[-1], 16)


def test_a_cache_too_large_is_refused_before_it_is_made(proteins, teacher, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 300)
    monkeypatch.setattr(torch, "empty", lambda *_: pytest.fail("allocated"))
    with pytest.raises(InputError, match="at most half of"):
        Cache(teacher, proteins)


def test_the_weights_best_on_validation_are_kept(proteins):
    hopeless = replace(SCHEDULE, steps=8, learning_rate=1.0, warmup=1.0, evaluate_every=2)
    model = student()
    progress = fit(model, proteins, proteins, None, Objective(), hopeless)
    assert progress.best_step < progress.step == 8
    assert mean_nll(model, proteins) == pytest.approx(progress.best_nll, rel=1e-6)
    assert progress.best_nll == min(nll for _, nll in progress.validations)


def test_half_precision_follows_full_precision(proteins, teacher):
    _, losses = trained(proteins, Live(teacher))
    _, half = trained(proteins, Live(teacher), replace(SCHEDULE, dtype="bfloat16"))
    assert half != losses
    np.testing.assert_allclose(half, losses, rtol=0.02)
    again = trained(proteins, Live(teacher))[1]
    assert again == losses  # one run does not set the type of the next
    with pytest.raises(InputError, match="a GPU required for --dtype float16"):
        trained(proteins, Live(teacher), replace(SCHEDULE, dtype="float16"))


def test_dropout_of_a_given_model_is_off_and_the_global_generator_is_left_alone(proteins):
    logs = [], []
    for rate, log in zip((0.0, 0.5), logs):
        model = student()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = rate
        before = torch.get_rng_state()
        fit(model, proteins, None, None, Objective(), SCHEDULE, report=log.append)
        assert torch.equal(before, torch.get_rng_state())
    assert logs[0] == logs[1]


class Interrupted(Exception):
    pass


def test_interrupted_and_resumed_is_bit_equal_to_uninterrupted(tmp_path, proteins, teacher):
    schedule = replace(SCHEDULE, steps=23, evaluate_every=4, save_every=5, accumulation=2)

    def run(name, stop=0, **other):
        def report(values):
            if values["step"] == stop:
                raise Interrupted

        model = student()
        (tmp_path / name).mkdir(exist_ok=True)
        changed = replace(schedule, **other)
        fit(model, proteins, proteins, Live(teacher), Objective(), changed, tmp_path / name, report)
        return state(model)

    whole = run("whole")
    for stop in (3, 9, 18):  # before the first checkpoint, after it, after the next
        with pytest.raises(Interrupted):
            run("torn", stop)
    with pytest.raises(InputError, match="of this very request"):
        run("torn", learning_rate=1e-3)
    assert torch.equal(run("torn"), whole)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("torn", "whole")]
    assert logs[0] == logs[1]


def test_a_full_sized_slice_is_the_teacher(teacher):
    torch.manual_seed(0)
    with torch.no_grad():  # no trivial gain
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made = initial_student(teacher, 3, 2, 32, "slice", seed=0).eval()
    tokens = torch.randint(27, (2, 20))
    with torch.no_grad():
        found, wanted = made(input_ids=tokens).logits, teacher(input_ids=tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="not larger"):
        initial_student(teacher, 4, 2, 32, "slice", seed=0)


def test_initial_weights_depend_on_the_seed_and_leave_the_global_generator_alone(teacher):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (state(initial_student(teacher, 2, 2, 16, "random", seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())
