"""Training: same gradient for every split into micro-batches and processes, exact resumption, caches that change
nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.generators import pretrain
from distil_rank.generators.fit import Schedule, checkpoints, fit, mean_nll
from distil_rank.generators.inherit import initial_student
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import fresh
from distil_rank.generators.teachers import Cache, Live
from distil_rank.core.devices import threads
from tests.generators.conftest import write_toy_fasta

SCHEDULE = Schedule(steps=6, batch_size=8, learning_rate=3e-3, seed=5)


def student(seed=0):
    return fresh(27, 2, 2, 16, 128, 0, seed)


def state(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(proteins, teacher, schedule=SCHEDULE, objective=None, **more):
    model = student()
    losses = []
    fit(
        model,
        proteins,
        None,
        teacher,
        objective or Objective(),
        schedule,
        report=lambda v: losses.append(v["loss"]),
        **more,
    )
    return state(model), losses


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
        parts, again = trained(proteins, Live(teacher), replace(SCHEDULE, accumulation=accumulation), objective)
        np.testing.assert_allclose(again, losses, rtol=1e-5)
        torch.testing.assert_close(parts, whole, rtol=0, atol=2e-4)


def test_exact_cache_gives_the_losses_of_the_live_teacher(proteins, teacher):
    objective = Objective(uncertainty=True, calibration=True)
    with threads(1):  # with more, sums may be taken in another order for another batch
        live, losses = trained(proteins, Live(teacher), objective=objective)
        cached, again = trained(proteins, Cache(teacher, proteins, batch_size=7), objective=objective)
    assert again == losses
    assert torch.equal(cached, live)


def test_a_protein_is_read_at_the_width_of_its_own_length(proteins, teacher):
    order = np.argsort(proteins.lengths)
    mixed = np.concatenate([order[:3], order[-3:]])
    tokens, mask = proteins.batch(mixed)
    with threads(1):
        together = Live(teacher).targets(mixed, tokens, mask)
        for row, i in enumerate(mixed):
            alone = Live(teacher).targets(mixed[[row]], *proteins.batch([i]))[0]
            assert torch.equal(together[row, : len(alone)], alone)
            with torch.no_grad():
                plain = teacher(input_ids=tokens[[row]]).logits[0, : len(alone)]
            torch.testing.assert_close(alone, plain)


def test_top_cache_of_the_whole_vocabulary_is_the_exact_one(proteins, teacher):
    objective = Objective(uncertainty=True)
    _, losses = trained(proteins, Live(teacher), objective=objective)
    _, again = trained(proteins, Cache(teacher, proteins, 27), objective=objective)
    np.testing.assert_allclose(again, losses, rtol=1e-5)
    _, fewer = trained(proteins, Cache(teacher, proteins, 8), objective=objective)
    assert fewer[0] < losses[0]  # fewer outcomes, less divergence
    with pytest.raises(InputError, match="top-k"):
        Cache(teacher, proteins, 28)


def test_best_weights_are_kept_and_patience_ends_the_run(proteins, teacher):
    hopeless = Schedule(steps=40, batch_size=8, learning_rate=3.0, warmup=0.0, evaluate_every=2, patience=3, seed=1)
    model = student()
    progress = fit(model, proteins, proteins, None, Objective(), hopeless)
    assert progress.step == progress.best_step + 6 < 40
    assert mean_nll(model, proteins) == pytest.approx(progress.best_nll, rel=1e-6)
    assert progress.best_nll == min(nll for _, nll in progress.validations)


def test_published_formula_trains_and_refuses_a_top_cache(proteins, teacher):
    _, losses = trained(proteins, Live(teacher), replace(SCHEDULE, published=True))
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match="published"):
        trained(proteins, Cache(teacher, proteins, 5), replace(SCHEDULE, published=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_full_precision(proteins, teacher, precision):
    _, losses = trained(proteins, Live(teacher))
    _, half = trained(proteins, Live(teacher), replace(SCHEDULE, precision=precision))
    np.testing.assert_allclose(half, losses, rtol=0.02)


@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"steps": 0}, {"accumulation": 0}, {"warmup": 1.5}])
def test_bad_schedules_are_refused(proteins, bad):
    with pytest.raises(InputError, match=next(iter(bad)).replace("_", "[-_]")):
        fit(student(), proteins, None, None, Objective(), replace(SCHEDULE, **bad))


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (5000, 10000, 900):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "writing-77").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-900", "step-5000", "step-10000"]


class Interrupted(Exception):
    pass


def test_interrupted_and_resumed_is_bit_equal_to_uninterrupted(tmp_path, proteins, teacher):
    schedule = replace(SCHEDULE, steps=23, evaluate_every=4, checkpoint_every=5)

    def run(name, stop=0):
        def report(values):
            if values["step"] == stop:
                raise Interrupted

        model = student()
        (tmp_path / name).mkdir(exist_ok=True)
        fit(model, proteins, proteins, Live(teacher), Objective(), schedule, tmp_path / name, report)
        return state(model)

    whole = run("whole")
    for stop in (3, 9, 18):  # before the first checkpoint, after it, after the next
        with pytest.raises(Interrupted):
            run("torn", stop)
    assert torch.equal(run("torn"), whole)
    for name in ("best.safetensors", "log.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def configuration(data, out, steps=8):
    return pretrain.Config(
        data=data, out=out, n_layer=2, n_head=2, n_embd=16, context=96, steps=steps, batch_size=4, evaluate_every=10,
        checkpoint_every=7, learning_rate=3e-3,
    )  # fmt: skip


def test_an_output_folder_is_never_taken_over_or_emptied(tmp_path):
    data = write_toy_fasta(tmp_path / "toy.fasta", 40)
    pretrain.run(configuration(data, tmp_path / "out"))
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="finished"):
        pretrain.run(configuration(data, tmp_path / "out"))
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    (tmp_path / "out" / "training.json").unlink()
    with pytest.raises(InputError, match="other steps"):
        pretrain.run(configuration(data, tmp_path / "out", 9))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        pretrain.run(configuration(data, tmp_path / "mine"))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="writable"):
        pretrain.run(configuration(data, tmp_path / "toy.fasta" / "below"))


def command(data, out, steps=60):
    return [
        sys.executable, "-m", "distil_rank", "generator", "pretrain", "--data", str(data), "--out", str(out),
        "--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--context", "96", "--steps", str(steps),
        "--batch-size", "4",
        "--evaluate-every", "10", "--checkpoint-every", "7", "--learning-rate", "3e-3",
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal_to_uninterrupted(tmp_path):
    data = write_toy_fasta(tmp_path / "toy.fasta", 80)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(data, tmp_path / "whole"), check=True, capture_output=True, env=environment)
    log = tmp_path / "torn" / "log.jsonl"
    process = subprocess.Popen(
        command(data, tmp_path / "torn"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 25):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "torn" / "training.json").exists()
    subprocess.run(command(data, tmp_path / "torn"), check=True, capture_output=True, env=environment)
    for name in ("model.safetensors", "best.safetensors", "log.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    data = write_toy_fasta(tmp_path / "toy.fasta", 80)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(data, tmp_path / "one", 8), check=True, capture_output=True, env=environment)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(torchrun + command(data, tmp_path / "two", 8)[1:], check=True, capture_output=True, env=environment)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("init", ["slice", "low-rank"])
def test_a_full_sized_student_from_the_teacher_is_the_teacher(teacher, init):
    torch.manual_seed(0)
    with torch.no_grad():  # gains and biases that are not trivial, except the last gain, which a tied head cannot take
        for name, parameter in teacher.named_parameters():
            if "ln_f.weight" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made = initial_student(teacher, 3, 2, 32, init, seed=0).eval()
    tokens = torch.randint(27, (2, 20))
    with torch.no_grad():
        found, wanted = made(input_ids=tokens).logits, teacher(input_ids=tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="not larger"):
        initial_student(teacher, 4, 2, 32, init, seed=0)


def test_initial_weights_depend_on_the_seed_and_leave_the_global_generator_alone(teacher):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (state(initial_student(teacher, 2, 2, 16, "random", seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())


def test_width_must_fit_the_heads():
    with pytest.raises(InputError, match="n-embd=30 and n-head=4; 28 or 32"):
        fresh(27, 2, 4, 30, 64, 0, 0)


def test_tensorboard_is_told_what_the_log_is_told(tmp_path):
    pytest.importorskip("torch.utils.tensorboard", reason="needs pip install tensorboard", exc_type=ImportError)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy = write_toy_fasta(tmp_path / "toy.fasta", 60)
    flags = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context": 96, "held_out": 0.2, "batch_size": 8, "steps": 4}
    pretrain.run(pretrain.Config(data=toy, out=tmp_path / "m", evaluate_every=2, log_to="tensorboard", **flags))
    told = EventAccumulator(str(tmp_path / "m" / "tensorboard"))
    told.Reload()
    log = [json.loads(line) for line in (tmp_path / "m" / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "validation_nll", "learning_rate"):
        expected = [(entry["step"], pytest.approx(entry[name])) for entry in log if name in entry]
        assert [(event.step, event.value) for event in told.Scalars(name)] == expected
