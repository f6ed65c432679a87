"""The commands that train: folders, splits that are kept, SIGKILL, several processes, sweeps."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest

from distil_rank.core.errors import InputError
from distil_rank.generators import (
    command_finetune,
    command_pretrain,
    command_publish,
    command_train,
)
from distil_rank.generators.models import load, weights_sha256
from distil_rank.generators.prepared import Prepared
from distil_rank.generators.train import CHECKPOINT

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def pretraining(data, out, steps=8, **more):
    return command_pretrain.Config(data=data, out=out, steps=steps, batch_size=4, **SHAPE, **more)


def command(data, out, steps=60):
    flags = {"data": data, "out": out, "n-layer": 2, "n-head": 2, "n-embd": 16}
    flags |= {"steps": steps, "batch-size": 4, "evaluate-every": 10, "save-every": 7}
    flags |= {"learning-rate": 3e-3}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "distil_rank", "generator", "pretrain", *given]


def assert_same_files(found, wanted):
    for name in ("model.safetensors", "log.jsonl"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


def test_teacher_student_and_finetuned_student_of_toys(tmp_path, data):
    command_pretrain.run(pretraining(data, tmp_path / "teacher"))
    given = {"data": data, "steps": 2, "batch_size": 8}
    teacher = str(tmp_path / "teacher")
    more = {"teacher_cache": True, "store_dtype": "float16", **SHAPE, **given}
    student, tuned = tmp_path / "student", tmp_path / "tuned"
    command_train.run(command_train.Config(teacher=teacher, out=student, **more))
    tuning = command_finetune.Config(model=str(student), out=tuned, subset=5, **given)
    for subset, message in ((0, "--subset must be at least 1"), (999, "--subset must be at most")):
        with pytest.raises(InputError, match=message):
            command_finetune.run(replace(tuning, subset=subset))
    command_finetune.run(tuning)  # the refused ones do not block it
    assert Prepared(data).doubts(str(tuned)) == {}  # and of what it started from
    folders = (tmp_path / "teacher", student, tuned)
    records = [json.loads((folder / "training.json").read_text()) for folder in folders]
    assert [r["kind"] for r in records] == ["pretrained", "distilled", "finetuned"]
    assert records[1]["teacher"]["weights_sha256"] == records[0]["weights_sha256"]
    assert records[2]["started_from"]["weights_sha256"] == records[1]["weights_sha256"]
    report = records[2]["fit"]
    assert report["proteins"] == 5 and report["cost"]["tokens"] > 0 < report["cost"]["seconds"]
    assert report["gap"] == records[2]["validation_nll"] - report["train_nll"]
    assert report["validation_nll_before"] == pytest.approx(records[1]["validation_nll"], abs=1e-3)
    assert weights_sha256(load(str(student))[0]) == records[1]["weights_sha256"]
    assert {p.name for p in student.iterdir()} == {*command_publish.FILES, "log.jsonl"}


def test_an_output_folder_is_never_taken_over_or_emptied(tmp_path, data):
    out = tmp_path / "out"
    command_pretrain.run(pretraining(data, out))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="finished"):
        command_pretrain.run(pretraining(data, out))
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        command_pretrain.run(pretraining(data, tmp_path / "mine"))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="writable"):
        command_pretrain.run(pretraining(data, data / "data.json" / "below"))


def test_a_run_that_failed_early_does_not_block_the_corrected_command(tmp_path, data):
    config = pretraining(data, tmp_path / "m", learning_rate=1e30)
    with pytest.raises(InputError, match="finite"):
        command_pretrain.run(replace(config, steps=300))
    command_pretrain.run(pretraining(data, tmp_path / "m"))
    assert (tmp_path / "m" / "training.json").exists()


@pytest.mark.parametrize("torn", ["save", "write_json"])
def test_a_training_killed_while_it_is_stored_goes_on(tmp_path, data, monkeypatch, torn):
    more = {"evaluate_every": 4, "save_every": 5}
    command_pretrain.run(pretraining(data, tmp_path / "whole", **more))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command_train, torn, killed)
        command_pretrain.run(pretraining(data, tmp_path / "m", **more))
    (tmp_path / "m" / f"{CHECKPOINT}.1.tmp").touch()  # as a kill while it is written leaves
    assert not (tmp_path / "m" / "training.json").exists()
    command_pretrain.run(pretraining(data, tmp_path / "m", **more))
    assert_same_files(tmp_path / "m", tmp_path / "whole")


BAD = [
    ({"batch_size": 0}, "--batch-size must be at least 1"),
    ({"weight_decay": -1.0}, "--weight-decay must be at least 0"),
    ({"steps": 0}, "--steps must be at least 1"),
    ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
    ({"learning_rate": float("nan")}, "--learning-rate must be above 0"),
    ({"accumulation": 0}, "--accumulation must be at least 1"),
    ({"warmup": 1.5}, "--warmup must be at most 1"),
    ({"alpha": 1.5}, "--alpha must be at most 1"),
    ({"tau": float("nan")}, "--tau must be above 0"),
    ({"smoothing": -0.1}, "--smoothing must be at least 0"),
    ({"n_embd": 30}, "n-embd must be divisible by n-head, got n-embd=30 and n-head=4; 32"),
    ({}, "data.json"),
    ({"dtype": "float16"}, "--dtype"),
    ({"device": "mps"}, "--device"),
    ({"log_to": "wandb"}, "the package wandb required"),
    ({"compile": True}, "a compiler required for --compile"),
]


@pytest.mark.parametrize("bad,message", BAD)
def test_bad_flags_are_refused_before_anything_is_read_or_written(
    tmp_path, monkeypatch, bad, message
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    monkeypatch.setattr("torch.compile", Mock(side_effect=RuntimeError("none found")))
    given = {"teacher": "none", "data": tmp_path / "none", "out": tmp_path / "m"}
    with pytest.raises(InputError, match=message):
        command_train.run(command_train.Config(**given | bad))
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal_to_uninterrupted(tmp_path, data):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    subprocess.run(command(data, tmp_path / "whole"), check=True, **quiet)
    log = tmp_path / "torn" / "log.jsonl"
    process = subprocess.Popen(command(data, tmp_path / "torn"), **quiet)
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 25):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "torn" / "training.json").exists()
    assert (tmp_path / "torn" / CHECKPOINT).exists()
    subprocess.run(command(data, tmp_path / "torn"), check=True, **quiet)
    assert_same_files(tmp_path / "torn", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path, data):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    python, *two = command(data, tmp_path / "two", 8)
    both = command(data, tmp_path / "one", 8), [python, *torchrun, *two]
    for line in both:
        subprocess.run(line, check=True, capture_output=True, env=environment)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_tensorboard_is_told_what_the_log_is_told(tmp_path, data):
    pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard", exc_type=ImportError)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "m"
    command_pretrain.run(pretraining(data, out, 4, evaluate_every=2, log_to="tensorboard"))
    told = EventAccumulator(str(out / "distil-rank"))
    told.Reload()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "validation_nll", "learning_rate"):
        expected = [(entry["step"], pytest.approx(entry[name])) for entry in log if name in entry]
        assert [(event.step, event.value) for event in told.Scalars(name)] == expected
