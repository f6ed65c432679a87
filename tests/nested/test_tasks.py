"""One linear probe of proteins and residues: scikit-learn's, from moments; marks are kept."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import accuracy_score, f1_score

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.nested import tasks
from distil_rank.nested.features import Representation
from distil_rank.nested.rows import TensorRows
from distil_rank.proteins.fasta import read_fasta, write_fasta
from tests.nested.data import write_residues


def test_discriminants_are_those_of_scikit_learn():
    draw = generator(0, "lda")
    labels = torch.randint(4, (500,), generator=draw)
    x = torch.randn(500, 9, generator=draw).double() + labels[:, None] * torch.linspace(0, 1, 9)
    T = torch.randn(5, 9, generator=draw).double()
    moments = Moments.of(torch.cat([x, torch.nn.functional.one_hot(labels).double()], 1))
    for shrinkage, (weights, bias) in zip(tasks.SHRINKAGE, tasks.discriminants(moments, T, 4)):
        slow = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
        z = (x @ T.T).numpy()
        scores = slow.fit(z, labels.numpy()).decision_function(z)
        difference = (x @ weights + bias).numpy() - scores
        np.testing.assert_allclose(difference - difference[:, :1], 0, atol=1e-8)


def test_scores_are_those_of_scikit_learn():
    draw = generator(0, "scores")
    truth, found = (torch.randint(5, (300,), generator=draw) for _ in range(2))
    counts = torch.zeros(5, 5).index_put_((truth, found), torch.ones(300), accumulate=True)
    assert float(tasks.accuracy(counts)) == pytest.approx(accuracy_score(truth, found))
    assert float(tasks.macro_f1(counts)) == pytest.approx(f1_score(truth, found, average="macro"))


def test_sides_masks_and_limits(tmp_path):
    path = write_residues(tmp_path)
    task = tasks.read_residues(path, None, 0)
    assert {side: len(found) for side, found in task.proteins.items()} == {
        "train": 35,
        "validation": 10,
        "test": 15,
    }
    assert task.classes == ["E", "H"] and task.pool == "residues"  # C is masked everywhere
    first = next(read_fasta(tmp_path / "toy_sequences.fasta")).sequence
    sequence, labels = task.proteins["test"][0]
    assert sequence == first and labels[0] == -1
    assert labels[1:].tolist() == [int(a <= "K") for a in first[1:]]
    few = tasks.read_residues(path, 4, 0).proteins
    assert [len(few[side]) for side in tasks.SIDES] == [4, 4, 4]
    for file in (path, tmp_path / "toy_sequences.fasta"):  # the first, of the test, once more
        records = list(read_fasta(file))
        again = replace(records[0], header="p60 SET=train VALIDATION=False")
        write_fasta(file, [*records, again])
    with pytest.raises(InputError, match="in no other part required, got 1 in toy"):
        tasks.read_residues(path, None, 0)
    write_residues(tmp_path)
    (tmp_path / "toy_mask.fasta").write_text(">p0\n11\n")
    with pytest.raises(InputError, match="as many letters, classes and marks"):
        tasks.read_residues(path, None, 0)


def test_windows_are_letters_at_their_place():
    window = tasks.letter_windows("ACX").view(3, tasks.WINDOW, 20)
    half = tasks.WINDOW // 2
    assert window[1, half, 1] == 1 and window[1, half - 1, 0] == 1  # C after A
    assert window.sum((1, 2)).tolist() == [2, 2, 2]  # X and what is beyond the ends: nothing


def test_a_feature_that_tells_the_class_and_noise(tmp_path, monkeypatch):
    """Rows are matched to their proteins' classes in every batch and side."""
    monkeypatch.setattr(tasks, "BATCH", 50)
    task = tasks.read_residues(write_residues(tmp_path), None, 0)
    labels = [labels for side in tasks.SIDES for _, labels in task.proteins[side]]
    every = torch.cat(labels).double()
    noise = torch.randn(len(every), 3, generator=generator(0, "noise")).double()
    lengths = list(map(len, labels))
    stores = {"a": TensorRows(noise, lengths), "b": TensorRows(every[:, None], lengths)}
    compared = [
        SimpleNamespace(name=f"raw_{k}", draw=None, features=lambda raws, k=k: raws[k])
        for k in "ab"
    ]
    assert set(Representation.__annotations__) >= {"name", "draw", "features"}
    found = tasks.measure(task, stores, compared, "raw_b", 0)["results"]
    assert found["raw_b"]["accuracy"]["value"] == 1 == found["raw_b"]["macro_f1"]["value"]
    assert found["raw_a"]["accuracy"]["value"] < 0.7 and found["raw_a"]["difference"]["high"] < 0
    assert found["one-hot"]["accuracy"]["value"] == 1  # the letter tells it
