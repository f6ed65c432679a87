"""The benchmark as users run it: `python main.py`."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from distil_rank.compress import head_function, tasks
from distil_rank.compress.head_students import FLOOR, FORMS, MAP, MAP_INT8, NARROW
from distil_rank.core import latency
from distil_rank.core.narrow import distill_narrow
from distil_rank.core.records import ROOT
from distil_rank.experiment import report, tables
from distil_rank.experiment.data import fitting_rank
from distil_rank.experiment.fidelity import HIGHER_IS_BETTER

SMALL = ["--steps", "40", "--seeds", "2"]
FAMILIAR = """svd_cosine svd_rel_mse student_cosine student_rel_mse cosine_improvement mse_reduction
latency_teacher_ms latency_student_ms speedup params_teacher params_student compression"""
STUDENTS = [
    main.CONSTANT,
    main.SVD,
    main.SVD_BIAS,
    main.PLAIN_DISTILLED,
    main.DISTILLED,
    main.OPTIMUM,
    main.SHRUNK,
    main.FLOOR,
]


@pytest.fixture(scope="module", autouse=True)
def little_effort():
    """Steps of denoisers, timings and draws that take little time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "EFFORT", {quick: (200, 3, 50) for quick in (False, True)})
        patch.setattr(latency, "SAMPLE_MS", 0.5)
        patch.setattr(tasks, "DRAWS", 50)
        patch.setattr(head_function, "distill_narrow", partial(distill_narrow, steps=20))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    g = torch.Generator().manual_seed(0)
    root = torch.randn(24, 24, generator=g) * torch.logspace(0, -2, 24)
    for name, n in (("train", 200), ("val", 60)):
        torch.save((torch.randn(n, 24, generator=g) @ root.T + 1).half(), folder / f"{name}.pt")
    return ["--train", str(folder / "train.pt"), "--val", str(folder / "val.pt")]


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    main.main([*data, *SMALL, "--rank", "3", "--out", str(folder)])
    return folder


def summary_of(folder):
    return json.loads((folder / "distil_rank_summary.json").read_text())


def test_every_familiar_key_is_there(results):
    summary = summary_of(results)
    assert (summary["real_data"], summary["target_rank"], summary["input_dim"]) == (True, 3, 24)
    assert list(summary["experiments"]) == ["Random", "Task-Trained", "Spectral"]
    for experiment in summary["experiments"].values():
        for key in FAMILIAR.split():
            assert isinstance(experiment[key], int | float), key
        students = experiment["students"]
        assert experiment["student_cosine"] == students[main.DISTILLED]["cosine"]["value"]
        assert experiment["svd_rel_mse"] == students[main.SVD]["relative_mse"]["value"]
        gain = experiment["student_cosine"] - experiment["svd_cosine"]
        assert experiment["cosine_improvement"] == gain
        ratio = experiment["params_teacher"] / experiment["params_student"]
        assert experiment["compression"] == ratio
        assert [row["batch"] for row in experiment["latency"]] == main.BATCHES
        assert list(students) == STUDENTS
        fields = {"value", "low", "high", "higher_is_better", "per_seed", "seeds_interval"}
        for label, metrics in students.items():
            # a bootstrapped floor is too low, so the floor has no interval
            known = fields - {"low", "high", "seeds_interval"} if label == main.FLOOR else fields
            assert all(known <= set(metrics[name]) for name in HIGHER_IS_BETTER)
            assert ("low" in metrics["fvu"]) == (label != main.FLOOR)
    assert {"schema", "config", "data", "seeds", "environment", "machine_dependent"} <= set(summary)
    assert summary["data"]["n_train"] == 200 and len(summary["data"]["sha256"]["val"]) == 64


def test_what_was_chosen_and_what_holds_for_other_rows_is_recorded(results):
    summary = summary_of(results)
    for name, experiment in summary["experiments"].items():
        losses = experiment["pilot"]["loss"]
        assert list(losses) == ["0.003", "0.001", "0.0003"]
        assert losses[f"{experiment['pilot']['learning_rate']:g}"] == min(losses.values())
        best, bracket = experiment["students"][main.OPTIMUM], experiment["bracket"]
        assert bracket["low"] == pytest.approx(sum(best["train_fvu"]) / 2)
        assert bracket["high"] == best["fvu"]["value"]
        assert ("task" in experiment) == (name == "Task-Trained")
    task = summary["experiments"]["Task-Trained"]["task"]
    assert task["wiener_mse"] < task["mse"] < 0.8 * task["constant_mse"]
    claim = summary["claim"]
    assert (claim["shape"], claim["rank"]) == ([1280, 1280], 64)
    assert [row["batch"] for row in claim["latency"]] == main.BATCHES
    assert summary["notices"] == [] and str(results) not in json.dumps(summary)
    for text in ("1280 x 1280, rank 64", "7.5 is published", "On its own task", "between"):
        assert text in tables.closing_table(summary)


def test_what_a_reader_must_know_first_is_in_the_record_and_the_terminal(
    data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(main, "EFFORT", {False: (1, 3, 50)})
    x = torch.load(data[1])
    torch.save(torch.cat([x[:3], torch.load(data[3])[:7]]), tmp_path / "few.pt")
    few = ["--val", str(tmp_path / "few.pt"), "--rank", "3"]
    main.main([*data[:2], *few, *SMALL, "--out", str(tmp_path / "out")])
    notices = summary_of(tmp_path / "out")["notices"]
    found = (
        "3 of 10 held-out rows are also",
        "10 held-out rows, fewer than 5 x rank 3",
        "NOT trained",
    )
    assert all(text in notice for text, notice in zip(found, notices, strict=True))
    assert "Denoiser (not trained)" in summary_of(tmp_path / "out")["experiments"]
    shown = capsys.readouterr().out
    assert shown.startswith("+---") and all(shown.count(notice) == 2 for notice in notices)


def test_no_student_is_below_the_floor_and_the_optimum_leads_on_training_rows(results):
    for experiment in summary_of(results)["experiments"].values():
        students = experiment["students"]
        floors = students[main.FLOOR]["fvu"]["per_seed"]
        for label, metrics in students.items():
            assert all(v >= f * (1 - 1e-6) for v, f in zip(metrics["fvu"]["per_seed"], floors)), (
                label
            )
            for best, other in zip(students[main.OPTIMUM]["train_fvu"], metrics["train_fvu"]):
                assert best <= other * (1 + 1e-5), label
            assert metrics["cosine"]["value"] <= experiment["cosine_bound"]["value"] + 1e-9


def test_curves_agree_with_the_summary(results):
    summary = summary_of(results)
    curves = json.loads((results / "distil_rank_curves.json").read_text())
    for name, experiment in curves["experiments"].items():
        rank, students = experiment["rank"], summary["experiments"][name]["students"]
        assert all(len(values) == 25 for values in rank.values())
        best, floor = students[main.OPTIMUM], students[main.FLOOR]
        assert rank["fvu"][3] == pytest.approx(best["fvu"]["value"], rel=1e-4)
        assert rank["cosine"][3] == pytest.approx(best["cosine"]["value"], rel=1e-5)
        assert rank["floor_fvu"][3] == pytest.approx(floor["fvu"]["value"], rel=1e-5)
        assert all(a >= b for a, b in zip(rank["train_fvu"], rank["train_fvu"][1:]))


def without_machine(summary):
    summary = json.loads(json.dumps(summary))
    for path in summary.pop("machine_dependent"):
        head, _, key = path.rpartition(".*.")
        for owner in summary[head].values() if head else [summary]:
            owner.pop(key)
    summary["config"].pop("out")
    return summary


def test_two_runs_agree_bit_for_bit_in_all_but_what_the_machine_decides(data, results, tmp_path):
    main.main([*data, *SMALL, "--rank", "3", "--out", str(tmp_path)])
    assert without_machine(summary_of(tmp_path)) == without_machine(summary_of(results))
    first, second = (folder / "distil_rank_curves.json" for folder in (results, tmp_path))
    assert first.read_bytes() == second.read_bytes()


def test_the_report_is_redrawn_from_the_json_alone(results, tmp_path):
    for name in ("distil_rank_summary.json", "distil_rank_curves.json"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    assert report.draw(tmp_path).read_bytes() == (results / report.PNG).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in results.iterdir())


def test_a_rectangular_layer_of_the_user_is_a_fourth_teacher(data, tmp_path):
    torch.save(torch.nn.Linear(24, 1).state_dict(), tmp_path / "head.pt")
    own = ["--teacher", str(tmp_path / "head.pt")]  # without --rank: at most the layer's own limit
    main.main([*data, *SMALL, *own, "--out", str(tmp_path / "out")])
    summary = summary_of(tmp_path / "out")
    experiment = summary["experiments"]["User (head)"]
    assert (experiment["params_teacher"], summary["target_rank"]) == (25, 1)
    assert experiment["students"][main.OPTIMUM]["fvu"]["value"] < 1e-9
    assert "head" not in summary
    wide = torch.eye(2, 100)
    layers = (torch.nn.Sequential(torch.nn.Linear(100, n)) for n in (2, 50))
    assert [fitting_rank(wide, layer, None) for layer in layers] == [2, 5]


def test_a_whole_head_of_the_user_beside_the_three_teachers(data, tmp_path, capsys):
    layer = torch.nn.Linear
    head = torch.nn.Sequential(layer(24, 30), torch.nn.Tanh(), layer(30, 20), torch.nn.Tanh())
    head.append(layer(20, 1))
    double = {name: tensor.double() for name, tensor in head.state_dict().items()}
    torch.save(double, tmp_path / "own.pt")
    x = torch.load(data[3]).float()
    np.save(tmp_path / "y.npy", (head(x)[:, 0] > head(x).median()).numpy().astype(float))
    given = ["--teacher", str(tmp_path / "own.pt"), "--activation", "tanh"]
    given += ["--labels", str(tmp_path / "y.npy"), "--out", str(tmp_path / "out")]
    main.main([*data, *SMALL, *given])
    summary = summary_of(tmp_path / "out")
    assert list(summary["experiments"]) == ["Random", "Task-Trained", "Spectral"]
    found = summary["head"]
    assert (found["name"], found["measure"], found["task"]) == ("own", "spearman", "AUROC")
    assert found["dense"]["value"] == 1 and found["weights"] == 24 * 30 + 30 * 20 + 20
    assert {s["student"] for s in found["students"]} == {*FORMS} - {FLOOR}  # of one output: none
    maps = [s for s in found["students"] if s["student"] in (MAP, NARROW) and s["ranks"] == [1]]
    assert len({s["student"] for s in maps}) == len(maps)  # a size that changes nothing is left out
    for student in found["students"]:
        assert student["kept"]["low"] <= student["kept"]["value"] <= 1
        assert student["fvu"]["low"] <= student["fvu"]["value"] <= student["fvu"]["high"]
        assert 0 <= student["task"]["value"] <= 1
        assert student["weights_ratio"] >= student.get("asked", 1) * (
            student["student"] != MAP_INT8
        )
    shown = capsys.readouterr().out
    assert "Head own, 1,340 weights" in shown and "AUROC on the labels" in shown


def test_without_data_the_word_synthetic_is_everywhere(tmp_path, monkeypatch, capsys):
    def small(n, seed, purpose):
        return torch.randn(n, 24, generator=main.generator(seed, purpose))

    monkeypatch.setattr(main, "ROOT", tmp_path)
    monkeypatch.setattr(main, "synthetic_embeddings", small)
    main.main([*SMALL, "--out", str(tmp_path)])
    notice, _, table = capsys.readouterr().out.partition("\n\n")
    assert "SYNTHETIC" in notice and notice.startswith("+---")
    assert "SYNTHETIC" in table and "synthetic" in notice.splitlines()[-1] + table
    summary = summary_of(tmp_path)
    assert summary["real_data"] is False and "synthetic" in summary["data"]["source"]
    assert "SYNTHETIC" in report.title(summary)


@pytest.mark.parametrize(
    ("given", "folder"),
    [([], "results"), (["--quick"], "results/quick"), (["--quick", "--out", "mine"], "mine")],
)
def test_quick_writes_into_the_folder_asked_for(given, folder):
    config = main.check(main.tyro.cli(main.Config, args=given))
    assert config.out == Path(folder) and (config.seeds == 2) == ("--quick" in given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "x.pt"], "--train and --val required, got one of them"),
        (["--train", "none.pt", "--val", "none.pt"], "existing file required"),
        (["--rank", "0"], "--rank must be between 1 and 24"),
        (["--rank", "25"], "--rank must be between 1 and 24"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seeds", "-1"], "--seeds must be at least 1"),
        (["--device", "tpu"], "--device must name a device"),
        (["--device", "cuda:99"], "--device must name a device"),
        (["--device", "meta"], "--device must name a device"),
        (["--key", "a"], "--teacher FILE required"),
        (["--labels", "a.npy"], "--teacher FILE required"),
        (["--activation", "relu"], "--teacher FILE required"),
        (["--synthetic"], "got both; choose one"),
        (["--teacher", "none.pt"], "existing file required"),
    ],
)
def test_bad_options_end_in_one_line_and_status_2(data, tmp_path, capsys, arguments, message):
    given = arguments if "--train" in arguments else [*data, *arguments]
    with pytest.raises(SystemExit) as stop:
        main.main([*given, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "distil_rank_summary.json").exists()


def test_bad_data_ends_in_one_line_and_status_2(data, tmp_path, capsys):
    def saved(name, content):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    (tmp_path / "text.pt").write_text("embeddings\n")
    narrow = saved("narrow.pt", torch.eye(7))
    constant = saved("constant.pt", torch.ones(5, 24))
    other = saved("other.pt", torch.nn.Linear(9, 9).state_dict())
    zero = saved("zero.pt", {"weight": torch.zeros(4, 24), "bias": torch.ones(4)})
    x = torch.load(data[1]).double()
    tiny, huge = saved("tiny.pt", x * 1e-20), saved("huge.pt", x * 1e20)
    np.savez(tmp_path / "named.npz", labels=np.ones(5), embeddings=x.numpy())
    (tmp_path / "known").mkdir()
    known = saved("known/train.pt", x)
    (tmp_path / "known" / "embeddings.json").write_text('{"model": "nano-256"}')
    cases = [
        ([*data[:3], narrow], "one width required, got 24 and 7"),
        ([*data[:3], constant], "rows that differ required, got one row 5 times"),
        (["--train", constant, *data[2:]], "rows that differ required"),
        ([*data[:3], str(tmp_path / "text.pt")], "a readable .pt file required"),
        (["--train", tiny, "--val", tiny], "a spread between 1e-06 and 1e+06 required"),
        (["--train", huge, "--val", huge], "e+20 in"),
        ([*data[:3], str(tmp_path / "named.npz")], "got labels, embeddings; save the matrix as X"),
        (["--train", known, *data[2:], "--embedding-model", "ESM-2 8M"], "'nano-256' required"),
        ([*data, "--teacher", other], "a teacher of 24 inputs required"),
        ([*data, "--teacher", zero], "a teacher whose output varies required"),
        ([*data, "--out", str(Path(narrow) / "out")], "writable output folder"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stop:
            main.main(["--out", str(tmp_path / "out"), *arguments])
        assert stop.value.code == 2
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_one_of_the_default_pair_missing_is_an_error(tmp_path, monkeypatch, capsys):
    torch.save(torch.eye(24), tmp_path / "embeddings_train.pt")
    monkeypatch.setattr(main, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        main.main(["--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "embeddings_val.pt" in capsys.readouterr().err


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_or_killed_the_previous_results_are_whole(
    data, results, tmp_path, sent, status
):
    before = {}
    for path in results.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
        before[path.name] = path.read_bytes()
    long = ["--rank", "20", "--steps", "1000000", "--out", str(tmp_path)]
    command = [sys.executable, "-u", "main.py", *data, *long]
    # a process started in the background ignores Ctrl-C, and so would its children
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=listening, **pipes)
    try:
        assert process.stdout.readline().startswith("+---")  # a notice, before the work
        process.send_signal(sent)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()  # a million steps would outlive a failed test
    assert process.returncode == status
    if sent == signal.SIGINT:
        assert error.strip() == "main.py: interrupted; earlier results are untouched"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
