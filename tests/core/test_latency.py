import torch
from torch import nn

from distil_rank import LowRankLinear
from distil_rank.core.devices import threads
from distil_rank.core.latency import compare_latency, parameters


def test_parameters_are_the_published_counts():
    student = LowRankLinear(torch.zeros(64, 1280), torch.zeros(1280, 64), torch.zeros(1280))
    assert parameters(nn.Linear(1280, 1280)) == 1_639_680 and parameters(student) == 165_120


def test_records_hold_every_batch_and_leave_the_threads_alone():
    before = torch.get_num_threads()
    teacher, student = (
        nn.Linear(64, 64),
        LowRankLinear(torch.zeros(4, 64), torch.zeros(64, 4), torch.zeros(64)),
    )
    records = compare_latency(teacher, student, [torch.zeros(b, 64) for b in (1, 32)], rounds=7)
    assert torch.get_num_threads() == before
    assert [r["batch"] for r in records] == [1, 32]
    for r in records:
        for key in ("teacher_ms", "student_ms", "speedup"):
            assert 0 < r[key]["q25"] <= r[key]["median"] <= r[key]["q75"]
        assert r["flop_bound"] == parameters(teacher) / parameters(student)
        assert r["fraction_of_bound"] == r["speedup"]["median"] / r["flop_bound"]


def test_the_thread_count_returns_after_an_error():
    before = torch.get_num_threads()
    try:
        with threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.get_num_threads() == before
