"""Aggregation equals hand-computed figures."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.tables_nested import outcome
from distil_rank.nested.compare import compare, leaderboard, wilcoxon
from distil_rank.nested.probe import spearman
from distil_rank.nested.report import decided

OURS = [0.50, 0.40, 0.30, 0.60, 0.20]
TESTS = {"wilcoxon_p", "holm_p"}
THEIRS = [0.45, 0.42, 0.30, 0.50, 0.12]


def test_hand_computed_fixture():
    (row,) = compare({"a": OURS, "b": THEIRS}, [("a", "b")], seed=0)
    assert row["difference"]["value"] == pytest.approx((0.05 - 0.02 + 0 + 0.10 + 0.08) / 5)
    assert row["win_rate"]["value"] == pytest.approx(3.5 / 5)  # three wins, one tie, one loss
    # Wilson: center (.7 + 3.8415 / 10) / 1.7683, half 1.96 / 1.7683 sqrt(.21 / 5 + 3.8415 / 100)
    found = row["win_rate"]
    assert (found["low"], found["high"]) == pytest.approx((0.2988, 0.9273), abs=2e-3)
    # signed ranks of .05 -.02 .10 .08 (the zero is dropped): 2, -1, 4, 3; W- = 1;
    # P(W- <= 1) = 2 / 16, two-sided 4 / 16
    assert row["wilcoxon_p"] == pytest.approx(4 / 16)
    assert row["holm_p"] == row["wilcoxon_p"]
    assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]


def test_holm_is_over_the_contrasts_and_the_described_are_not_tested():
    rng = np.random.default_rng(0)
    scores = {name: (rng.standard_normal(12) + i / 2).tolist() for i, name in enumerate("abc")}
    alone = compare(scores, [("a", "b"), ("a", "c"), ("b", "c")], seed=0)
    raw = sorted(row["wilcoxon_p"] for row in alone)
    stepped = np.maximum.accumulate([p * k for p, k in zip(raw, (3, 2, 1))])
    assert sorted(row["holm_p"] for row in alone) == pytest.approx(np.minimum(stepped, 1).tolist())
    rows = compare(scores, [("a", "b")], seed=0, described=[("a", "c")])
    assert [set(r) - set(rows[1]) for r in rows] == [TESTS, set()] and not decided(rows[1])
    assert rows[1]["difference"] == alone[1]["difference"]


def test_leaderboard_by_hand():
    told = [("P", "Binding"), ("P", "Binding"), ("Q", "Binding"), ("P", "Stability")]
    assays = [SimpleNamespace(name="", protein=p, function=f) for p, f in told]
    found = leaderboard([0.1, 0.3, 0.6, 0.8], assays)
    assert found == pytest.approx({"mean": 0.6, "Binding": 0.4, "Stability": 0.8})
    plain = [SimpleNamespace(name=n, protein="", function="") for n in "abcd"]
    assert leaderboard([0.1, 0.3, 0.6, 0.8], plain)["mean"] == pytest.approx(0.45)


def test_ties_and_constants():
    assert wilcoxon(OURS, OURS) == 1.0
    (tied,) = compare({"a": OURS}, [("a", "a")], seed=0)
    assert tied["win_rate"]["value"] == 0.5 and tied["wilcoxon_p"] == 1
    assert spearman(np.ones(5), OURS) == 0.0
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


def test_a_verdict_needs_holms_p_and_six_assays():
    def row(value, n, p):
        return {"holm_p": p, "difference": {"value": value, "low": 0.05, "high": 0.15, "n": n}}

    assert outcome(row(0.1, 12, 0.01)) == "is better than"
    assert outcome(row(-0.1, 6, 0.049)) == "is worse than"
    for undecided in (row(0.1, 12, 0.05), row(0.1, 12, 1.0), row(0.1, 5, 0.01), row(0.1, 1, 0.0)):
        assert outcome(undecided) == "cannot be told apart from" and not decided(undecided)


def test_false_verdicts_are_rare_and_effects_are_found(monkeypatch):
    # intervals take long, and no verdict looks at them; multipletests collects garbage
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    monkeypatch.setattr("distil_rank.nested.compare.over_assays", lambda x, seed: {"n": len(x)})
    rng = np.random.default_rng(2)
    names, false = "abcdefg", 0
    pairs = [("a", other) for other in names[1:]]
    for _ in range(300):
        scores = {name: rng.standard_normal(12).tolist() for name in names}
        false += any(map(decided, compare(scores, pairs, seed=0)))
    assert false <= 15  # 5 % of 300
    shifted = [x + 3 + 0.1 * y for x, y in zip(scores["b"], scores["c"])]
    assert decided(compare({**scores, "a": shifted}, [("a", "b")], seed=0)[0])
    (row,) = compare({"a": [0.5], "b": [0.1]}, [("a", "b")], seed=0)
    assert not decided(row)
