"""Fewer neurons: the regression is least squares in the metric, few neurons are near the best few,
MLPs are found whatever their modules are, and the folder of a pruned model is read everywhere."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import distil_rank
from distil_rank.compress import neurons as neurons_module
from distil_rank.compress import storage
from distil_rank.compress.architectures import describe
from distil_rank.compress.evaluate import compare
from distil_rank.compress.models import compress_model
from distil_rank.compress.neurons import find_mlps, refitted, selected
from distil_rank.compress.quantise import on_integers, quantise_model
from distil_rank.compress.ranks import allocate, or_neurons
from distil_rank.compress.sites import find_sites, trace
from distil_rank.core.linear import PrunedLinear, linear
from distil_rank.core.lowrank import Joint
from distil_rank.core.moments import Moments
from distil_rank.proteins.checkpoints import load_model
from tests.compress.small_models import KINDS, output, small_model, token_batches
from tests.compress.test_any_module import made
from tests.compress.test_ranks import brute_force, dense_cost, layer


def case(width: int = 8, d_out: int = 5, rows: int = 200, seed: int = 0):
    """A layer, rows of neurons that depend on each other, and a metric at its output."""
    draws = torch.Generator().manual_seed(seed)
    W, x, mix, root = (
        torch.randn(*shape, generator=draws, dtype=torch.float64)
        for shape in ((d_out, width), (rows, width), (width, width), (d_out, d_out))
    )
    bias = torch.linspace(-1, 1, d_out, dtype=torch.float64)
    return linear(W, bias), (x @ mix).relu(), root @ root.T


def least_squares(last: nn.Linear, a: torch.Tensor, metric: torch.Tensor, kept) -> float:
    """Mean loss in the metric of the best weights on neurons `kept`, by lstsq on the rows."""
    y = last(a)
    ones = torch.ones(len(a), 1, dtype=a.dtype)
    x = torch.cat([a[:, list(kept)], ones], 1)
    error = y - x @ torch.linalg.lstsq(x, y).solution
    return float(((error @ metric) * error).sum() / len(a))


@pytest.mark.parametrize("panels", [512, 3])
def test_losses_are_those_of_least_squares_in_the_metric(panels, monkeypatch):
    monkeypatch.setattr(neurons_module, "PANELS", panels)
    last, a, metric = case(width=12)
    found = selected(last, Moments.of(a), metric)
    for k in range(1, 13):
        K, W, bias = found.kept(k)
        assert len(set(K.tolist())) == k
        error = a[:, K] @ W.T + bias - last(a)
        achieved = float(((error @ metric) * error).sum() / len(a))
        best = least_squares(last, a, metric, K.tolist())
        assert achieved == pytest.approx(best, rel=1e-3, abs=1e-4 * float(found.losses[0]))
        assert float(found.losses[k]) == pytest.approx(
            best, rel=1e-3, abs=1e-3 * float(found.losses[0])
        )
        again = refitted(
            Joint.of_layer(last.weight, last.bias, Moments.of(a)), K, last.weight[:, K]
        )
        torch.testing.assert_close(
            a[:, K] @ again[0].T + again[1], error + last(a), rtol=0, atol=1e-3
        )


def test_the_neurons_taken_are_nearly_the_best_ones():
    ratios = []
    for seed in range(20):
        last, a, metric = case(seed=seed)
        found = selected(last, Moments.of(a), metric)
        for k in (2, 4, 6):
            subsets = itertools.combinations(range(8), k)
            best = min(least_squares(last, a, metric, subset) for subset in subsets)
            ratios.append(least_squares(last, a, metric, found.order[:k].tolist()) / best)
    assert min(ratios) >= 1 - 1e-9 and np.mean(ratios) < 1.15 and max(ratios) < 2.5


def test_neurons_that_follow_from_others_cost_nothing():
    last, a, metric = case(width=6)
    twice = torch.cat([a, 2 * a + 1], 1)
    whole = linear(torch.cat([last.weight, last.weight], 1), last.bias)
    found = selected(whole, Moments.of(twice), metric)
    assert float(found.losses[6]) < 1e-4 * float(found.losses[0])
    K, W, bias = found.kept(12)
    torch.testing.assert_close(twice[:, K] @ W.T + bias, whole(twice), rtol=1e-6, atol=1e-6)


def test_a_choice_between_ranks_and_neurons_is_the_best_one():
    for seed in range(30):
        shapes = enumerate(((4, 9), (9, 4), (6, 6)))
        first, last, other = (layer(f"l{i}", *shape, seed + i) for i, shape in shapes)
        losses = np.sort(np.random.default_rng(seed).exponential(size=9) ** 3)[::-1]
        for ratio in (0.4, 0.6, 0.8):
            budget = ratio * dense_cost([first, last, other])
            found = allocate([or_neurons([first, last], "l1", 9, losses), other], budget)
            best = brute_force([first, last, other], budget)
            for k, loss in enumerate(losses[1:], 1):
                if (rest := budget - 8 * k) >= other.costs[0]:
                    best = min(best, loss + brute_force([other], rest))
            assert found.bound <= best + 1e-12 and found.loss == pytest.approx(best, abs=1e-12)
            if found.neurons:
                assert found.ranks["l0"] is found.ranks["l1"] is None and found.neurons["l1"] < 9


class Odd(nn.Module):
    """Beside an MLP: neurons normalized together, neurons read twice, slopes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.normed, self.read, self.sloped = (
            nn.ModuleList([nn.Linear(12, 20), nn.Linear(20, 12)]) for _ in range(4)
        )
        self.norm, self.slopes = nn.LayerNorm(20), nn.PReLU(20)

    def forward(self, x):
        x = x + self.plain[1](self.plain[0](x).relu())
        x = x + self.normed[1](self.norm(self.normed[0](x)))
        h = self.read[0](x).relu()
        x = x + self.read[1](h) + h.mean(-1, keepdim=True)
        return x + self.sloped[1](self.slopes(self.sloped[0](x)))


def mlps_of(model: nn.Module, batches: list) -> dict[str, list[str]]:
    found = find_mlps(model, batches, trace(model, batches, find_sites(model)))
    return {name: [s.name for s in sites] for name, sites in found.items()}


def test_only_mlps_are_found():
    torch.manual_seed(0)
    assert mlps_of(Odd(), [torch.randn(30, 12)]) == {"plain.1": ["plain.0", "plain.1"]}
    chain = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
    assert mlps_of(chain, [torch.randn(30, 8)]) == {"2": ["0", "2"]}
    for kind in ("T5GatedEncoderModel", "BertModel", "DistilBertModel", "TransformerEncoder"):
        with torch.random.fork_rng(devices=[]):
            model, batches = made(kind)
        found = mlps_of(model, batches)
        assert len(found) == 2, kind
        assert {len(names) for names in found.values()} == {3 if "Gated" in kind else 2}
    for kind in KINDS:
        model = small_model(kind)
        found = mlps_of(model, token_batches(model))
        assert len(found) == 2 and all(len(names) == 2 for names in found.values()), kind


INCLUDE = ("*fc?", "*dense", "*mlp*")


@cache
def pruned_model(kind: str, sequential: bool = False):
    model = small_model(kind)
    batches = token_batches(model, rows=8, length=40)
    small, report = compress_model(
        model, batches, ratio=0.3, include=INCLUDE, sequential=sequential
    )
    return model, batches, small, report


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_neurons_beat_low_rank_within_the_same_budget(kind, sequential):
    model, batches, small, report = pruned_model(kind, sequential)
    assert any(isinstance(part, PrunedLinear) for part in small.modules())
    called = [x for x in report.layers if x.note != "not called in the forward pass"]
    assert sum(x.parameters_after for x in called) <= 0.3 * sum(x.parameters for x in called)
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    low_rank, _ = compress_model(
        model, batches, ratio=0.3, include=INCLUDE, sequential=sequential, neurons=False
    )
    losses = [
        compare(describe(model), model, m, batches)["hidden_fvu"]["value"]
        for m in (small, low_rank)
    ]
    assert losses[0] < losses[1]


def test_an_mlp_may_be_two_blocks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3))
    x = torch.randn(500, 30, generator=torch.Generator().manual_seed(1))
    small, report = compress_model(model, [x], ratio=0.5, sequential=True, held_out=[x])
    first, last = report.layers
    assert first.neurons == last.neurons and small[0].out_features == last.neurons[0] < 40
    assert last.held_out_loss == pytest.approx(last.held_out_floor, rel=1e-3)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_folder_with_fewer_neurons_is_read_for_embeddings(bits, tmp_path):
    for kind in ("esm2", "EsmForMaskedLM"):
        model, batches, small, _ = pruned_model(kind)
        if bits:
            small, _ = quantise_model(small, batches, bits)
        storage.save(small, tmp_path / kind, describe(model))
        assert torch.equal(
            output(distil_rank.load(tmp_path / kind), batches[0]), output(small, batches[0])
        )
        on_integers(small, False)  # those weights become floating-point ones
        tokens = batches[0] if kind == "esm2" else batches[0]["input_ids"]
        found = load_model(str(tmp_path / kind), head=True).model(tokens).logits
        keep = describe(model).residues(batches[0])
        torch.testing.assert_close(found[keep], output(small, batches[0]), rtol=1e-4, atol=1e-5)
