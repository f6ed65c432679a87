"""Labels, the metric that fits them, and its paired change."""

import numpy as np
import pytest
import scipy.stats
import torch

from distil_rank.compress.tasks import (
    accuracy,
    auroc,
    choose_metric,
    load_labels,
    spearman,
    task_change,
)
from distil_rank.core.errors import InputError


def test_metrics_equal_the_obvious_ones():
    source = np.random.default_rng(0)
    score, labels = source.normal(size=(80, 1)), (source.random(80) < 0.3).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in score[labels == 1, 0] for b in score[labels == 0, 0]]
    assert auroc(score, labels) == pytest.approx(np.mean(pairs))
    assert accuracy(np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 1])) == 0.75
    values = source.normal(size=80)
    name, metric = choose_metric(1, values)
    assert name == "Spearman" and metric(score, values) == pytest.approx(
        scipy.stats.spearmanr(score[:, 0], values).statistic
    )
    assert (
        choose_metric(1, labels)[0] == "AUROC"
        and choose_metric(4, np.array([0, 1, 2, 3.0]))[0] == "accuracy"
    )
    assert np.isnan(auroc(score, np.ones(80))) and np.isnan(spearman(score, np.ones(80)))
    with pytest.raises(InputError, match="fit a head of 4"):
        choose_metric(4, values)


def test_an_unchanged_head_has_no_change_and_a_paired_interval_is_narrow():
    output = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    labels = output[:, 0].double().numpy() + np.random.default_rng(0).normal(size=200)
    found = task_change(output, output, labels)
    assert found.change == {"value": 0.0, "low": 0.0, "high": 0.0, "higher_is_better": True}
    noisy = output + 0.05 * torch.randn(200, 1, generator=torch.Generator().manual_seed(1))
    found = task_change(output, noisy, labels)
    width = found.change["high"] - found.change["low"]
    assert width < 0.3 * (found.before["high"] - found.before["low"])


def test_labels_are_read_and_refused(tmp_path):
    y = np.array([0.5, 1.0, 2.0])
    np.save(tmp_path / "y.npy", y)
    np.savez(tmp_path / "y.npz", y=y)
    torch.save(torch.tensor(y), tmp_path / "y.pt")
    (tmp_path / "y.csv").write_text("id,label\na,0.5\nb,1\nc,2\n")
    for suffix in ("npy", "npz", "pt", "csv"):
        assert np.array_equal(load_labels(tmp_path / f"y.{suffix}", 3), y)
    with pytest.raises(InputError, match="4 finite labels"):
        load_labels(tmp_path / "y.npy", 4)
    np.save(tmp_path / "object.npy", np.array(["a", None], dtype=object), allow_pickle=True)
    (tmp_path / "words.csv").write_text("a,b\nx,y\n")
    (tmp_path / "empty.csv").write_text("")
    for name in ("object.npy", "absent.npy", "y.txt", "words.csv", "empty.csv", "absent.csv"):
        with pytest.raises(InputError):
            load_labels(tmp_path / name, 2)
