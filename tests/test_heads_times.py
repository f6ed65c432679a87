"""What a student costs follows from its shape, and the tables say what was measured."""

import pytest
import torch
from torch import nn

from benchmarks import heads
from benchmarks.tables_heads import times
from distil_rank.compress.head_students import FLOOR, FORMS, compare
from distil_rank.compress.quantise import module_bytes
from distil_rank.core import latency
from distil_rank.core.heads import UnitNorm


@pytest.fixture(scope="module")
def measured():
    """A head of three layers and its students at two sizes."""
    source = torch.Generator().manual_seed(0)
    layers = nn.Linear(24, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 12)
    head = nn.Sequential(UnitNorm(1e-9), *layers, UnitNorm(1e-9)).eval()
    x = torch.randn(120, 24, generator=source)
    with torch.no_grad():
        return head, compare(head, x[:80], x[80:], ratios=(2, 4))


def test_a_shape_has_the_weights_and_bytes_of_the_student_fitted(measured):
    head, found = measured
    students = [s for s in found["students"] if s["student"] != FLOOR]
    assert {s["student"] for s in students} == {*FORMS} - {FLOOR}
    for student in students:
        made = heads.shaped(list(head), student)
        assert module_bytes(head) / module_bytes(made) == pytest.approx(student["bytes_ratio"])
        if "int8" not in student["student"]:
            weights = sum(p.numel() for p in made.parameters() if p.ndim == 2)
            assert found["weights"] / weights == pytest.approx(student["weights_ratio"])
        assert made.eval()(torch.randn(3, 24)).shape == (3, 12)


def test_times_stand_beside_what_is_kept_and_are_named_missing(measured, monkeypatch):
    head, found = measured
    monkeypatch.setattr(latency, "SAMPLE_MS", 0.01)
    monkeypatch.setattr(heads, "ROUNDS", 2)
    record = {"cells": {"toy x rows": found}}
    assert times(record) == "Not measured yet."
    heads.timed(found, head, {})
    for student in found["students"]:
        if student["student"] != FLOOR:
            assert [t["batch"] for t in student["times"]] == list(heads.BATCHES)
            assert found["flops"] / student["flops"] == pytest.approx(
                student["weights_ratio"], 0.01
            )
    record["times"] = {"rounds": 2, "threads": 1, "environment": {"cpu": "x", "commit": "y"}}
    table = times(record)
    assert "dense" in table and f"{found['flops']:,}" in table
    known = {s["student"] for s in found["students"] if s["kept"]["value"] >= 0.95}
    assert all((f" {form} |" in table) == (form in known - {FLOOR}) for form in FORMS)
