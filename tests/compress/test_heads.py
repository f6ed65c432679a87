"""Heads compressed layer by layer, and their certificates."""

import json

import pytest
import torch
from torch import Tensor, nn

from distil_rank.compress.head_layers import (
    Request,
    choices_of_ranks,
    find_targets,
    fit,
    squared_jacobian,
)
from distil_rank.compress.heads import compress_head
from distil_rank.compress.sites import evaluating
from distil_rank.core.errors import InputError
from distil_rank.core.heads import UnitNorm
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import optimum
from distil_rank.core.moments import Moments


def rows(n: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    mix = torch.randn(60, 60, generator=torch.Generator().manual_seed(1)) * torch.linspace(
        2, 0.02, 60
    )
    return torch.randn(n, 60, generator=source) @ mix.T + 3


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(60, 80), nn.GELU(), nn.Linear(80, 50), nn.ReLU(), nn.Linear(50, 4)
        ).eval()


def lost(found: Tensor, y: Tensor) -> float:
    """FVU of `found` as a model of y (n, d)."""
    found, y = found.detach().double(), y.detach().double()
    return float((found - y).square().sum() / (y - y.mean(0)).square().sum())


def test_the_certificate_is_what_the_stored_factors_do():
    head, x, held = mlp(), rows(300), rows(200, seed=5)
    small, certificate = compress_head(head, x, held, rank=10)
    state, compressed = held, held
    for i, (a, b) in enumerate(zip(head, small)):
        state, compressed = a(state).detach(), b(compressed).detach()
        if isinstance(b, LowRankLinear):
            layer = next(found for found in certificate.layers if found.name == str(i))
            fvu = lost(compressed, state)
            assert layer.held_out_achieved_fvu == pytest.approx(fvu, rel=1e-3)
            assert layer.held_out_fvu_interval["value"] == pytest.approx(fvu, rel=1e-3)
            assert layer.held_out_floor_fvu <= layer.held_out_achieved_fvu
            assert layer.floor_fvu <= layer.achieved_fvu + 1e-9
            low, high = (layer.held_out_fvu_interval[k] for k in ("low", "high"))
            assert low <= fvu * 1.001 and fvu * 0.999 <= high
    fvu = lost(compressed, state)
    assert certificate.output_fvu["held_out"]["value"] == pytest.approx(fvu, rel=1e-4)
    record = json.loads(json.dumps(certificate.record(), allow_nan=False))
    assert record["schema"] == "distil-rank/certificate/1" and record["held_out_rows"] == 200
    assert record["layers"][2]["rank"] is None and "achieved_fvu" not in record["layers"][2]


def test_the_rank_curve_is_the_loss_of_each_rank():
    layer, x, held = nn.Linear(60, 60), rows(300), rows(200, seed=5)
    curve = compress_head(layer, x, held, rank=10)[1].layers[0].rank_curve
    points = zip(curve.rank, curve.fvu, curve.held_out_fvu, curve.held_out_floor_fvu)
    for rank, fvu, held_fvu, floor in [p for p in points if p[0] <= 25]:
        found = compress_head(layer, x, held, rank=rank)[1].layers[0]
        assert fvu == pytest.approx(found.achieved_fvu, rel=1e-3)
        assert held_fvu == pytest.approx(found.held_out_achieved_fvu, rel=1e-3)
        assert floor == pytest.approx(found.held_out_floor_fvu, rel=1e-3)


def test_each_layer_corrects_the_one_before():
    """Layers fitted on what really reaches them lose less than layers fitted on the teacher's."""
    head, x, held = mlp(), rows(2000), rows(500, seed=5)
    small, _ = compress_head(head, x, held, rank=8)
    apart = [
        compress_head(head[0], x, rank=8)[0],
        compress_head(head[2], head[:2](x).detach(), rank=8)[0],
    ]
    unaware = head[4](apart[1](nn.functional.gelu(apart[0](held))).relu())
    assert lost(small(held), head(held)) < lost(unaware, head(held))


def test_the_metric_of_the_output_lowers_the_loss_of_the_output():
    head, x, held = mlp(), rows(2000), rows(500, seed=5)
    losses = [
        compress_head(head, x, held, rank=4, metric=metric)[1].output_fvu["held_out"]["value"]
        for metric in ("own", "output")
    ]
    assert losses[1] < 0.7 * losses[0]
    # what a user gets who asks for none
    for request, metric in (({"rank": 4}, "output"), ({"fvu": 0.1}, "own")):
        assert compress_head(head, x, **request)[1].metric == metric
        assert compress_head(head[0], x, **request)[1].layers[0].floor_fvu >= 0


def test_a_last_scaling_to_unit_length_does_not_change_how_ranks_are_shared():
    """Losses of all layers are in units of the raw output: one loss in others starves a layer."""
    x, ranks = rows(500), []
    for last, scale in ((UnitNorm(), 0.01), (UnitNorm(), 100.0), (nn.Identity(), 1.0)):
        head = nn.Sequential(*list(mlp())[:3], last)
        with torch.no_grad():
            head[2].weight *= scale
            head[2].bias *= scale
        ranks.append([found.rank for found in compress_head(head, x, speedup=4)[1].layers])
    assert ranks[0] == ranks[1]
    assert all(abs(a - b) <= 6 for a, b in zip(ranks[0], ranks[2]))  # only the choice may differ


def test_of_several_ways_to_share_the_ranks_the_rows_choose_the_best():
    head, x = mlp(), rows(500)
    certificate = compress_head(head, x, speedup=4)[1]
    with torch.no_grad(), evaluating(head):
        targets, _ = find_targets(list(head), x, None, True, 60, 0)
        choices = choices_of_ranks(list(head), targets, Request(speedup=4), False, True)
        found = [nn.Sequential(*fit(list(head), targets, c, x, False)[0]) for c in choices]
        losses = [lost(other(x), head(x)) for other in found]
    assert len(choices) > 1 and certificate.output_fvu["fitted"]["value"] == pytest.approx(
        min(losses), rel=1e-4
    )


def test_a_dense_layer_is_refitted_to_its_changed_inputs():
    head, x, held = mlp(), rows(2000), rows(500, seed=5)
    small, certificate = compress_head(head, x, held, rank=8)
    assert [type(part) is nn.Linear for part in small][::2] == [False, False, True]
    assert "refitted" in certificate.layers[2].note
    with torch.no_grad():
        reached, y = small[:4](held), head(held)
        fvu = lost(small[4](reached), y)
        design = torch.cat([small[:4](x), torch.ones(2000, 1)], 1)
        least = lost(design @ torch.linalg.lstsq(design, head(x)).solution, head(x))
    assert fvu == pytest.approx(certificate.layers[2].held_out_fvu_interval["value"], rel=1e-3)
    assert fvu < lost(head[4](reached), y)
    assert least <= lost(small(x), head(x)) < 1.05 * least


def test_few_rows_are_drawn_to_the_weight():
    layer, held = nn.Linear(60, 60).requires_grad_(False), torch.randn(2000, 60)
    x = torch.randn(70, 60, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        layer.weight *= torch.logspace(0, -1.5, 60)
    few, certificate = compress_head(layer, x, held, rank=8)
    assert certificate.prior.weight > 0
    plain = optimum(layer.weight, layer.bias, Moments.of(x)).student(8, torch.float32)
    assert lost(few(held), layer(held)) < lost(plain(held), layer(held))
    assert compress_head(layer, held, rank=8)[1].prior is None


def test_metric_by_probes_is_the_mean_of_squared_jacobians():
    parts, y = [nn.Tanh(), nn.Linear(5, 3)], torch.randn(4000, 5)
    J = parts[1].weight[None] * (1 - y.tanh().square())[:, None, :]
    exact = torch.einsum("nij,nik->jk", J, J).double() / len(y)
    found = squared_jacobian(parts, y, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, exact.detach(), rtol=0.1, atol=0.02)


def test_requests_are_kept():
    head, x = mlp(), rows(300)
    for speedup in (2, 5):
        _, certificate = compress_head(head, x, speedup=speedup)
        assert certificate.flops_ratio >= speedup
    for int8 in (False, True):
        for size in (8000, 12000):
            _, certificate = compress_head(head, x, bytes=size, int8=int8)
            assert 0.8 * size <= certificate.bytes_after <= size
    _, certificate = compress_head(head[0], x, fvu=0.05)
    found = certificate.layers[0]
    assert found.achieved_fvu <= 0.05
    below = [f for r, f in zip(found.rank_curve.rank, found.rank_curve.fvu) if r < found.rank]
    assert min(below) > 0.05


def test_bytes_are_kept_by_one_map_of_a_double_head():
    x = rows(100).double()
    certificate = compress_head(mlp().double(), x, bytes=2000, metric="whole")[1]
    assert 1500 < certificate.bytes_after <= 2000


def test_without_held_out_rows_nothing_is_said_of_them():
    for options in ({}, {"int8": True}, {"metric": "whole"}, {"metric": "whole", "int8": True}):
        certificate = compress_head(mlp(), rows(300), rank=3, **options)[1]
        assert certificate.output_fvu.keys() == {"fitted"} and certificate.held_out_rows is None
        layer = certificate.layers[0]
        assert layer.achieved_fvu > 0
        assert layer.held_out_achieved_fvu is layer.held_out_floor_fvu is None


def test_layers_that_would_not_shrink_stay_dense():
    head, x = mlp(), rows(300)
    small, certificate = compress_head(head, x, rank=35)
    assert small[0] is head[0] and "dense" in certificate.layers[0].note
    assert torch.equal(small(x), head(x))


def test_int8_shares_the_error_out():
    layer, x, held = nn.Linear(60, 60), rows(300), rows(200, seed=5)
    _, certificate = compress_head(layer, x, held, rank=10, int8=True)
    found = certificate.layers[0]
    parts = found.int8
    assert found.held_out_achieved_fvu == pytest.approx(parts.fvu)
    assert parts.fvu == pytest.approx(parts.low_rank + parts.quantisation, rel=0.05)
    assert parts.quantisation < 0.1 * parts.low_rank


def test_mode_and_frozen_layers_are_the_heads():
    head, x = mlp().train(), rows(300)
    head[0].requires_grad_(False)
    head[1].eval()
    small, _ = compress_head(head, x, rank=8)
    assert small.training and small[0].training and small[2].training and not head[1].training
    assert not small[0].A.weight.requires_grad and small[2].B.bias.requires_grad
    assert type(small[4]) is nn.Linear and small[4].weight.requires_grad
    assert not compress_head(head.eval(), x, rank=8)[0][0].training


def test_bad_heads():
    x = rows(50)
    for arguments, message in (
        ({}, "exactly one"),
        ({"rank": 4, "fvu": 0.1}, "exactly one"),
        ({"rank": 0}, "rank must be"),
        ({"fvu": 1.5}, "fvu must be"),
        ({"speedup": 0.5}, "speedup must be"),
        ({"speedup": 1e5}, "budget"),
        ({"bytes": 10}, "bytes required"),
        ({"rank": 4, "metric": "best"}, "metric"),
        ({"fvu": 0.1, "metric": "narrow"}, "rank, speedup or bytes"),
        ({"rank": 4, "metric": "narrow", "int8": True}, "got int8"),
    ):
        with pytest.raises(InputError, match=message):
            compress_head(mlp(), x, **arguments)
    with pytest.raises(InputError, match="shape"):
        compress_head(mlp(), torch.randn(50, 61), rank=4)
    with pytest.raises(InputError, match="3 of 50 rows"):
        x = rows(50)
        x[:3, 0] = float("nan")
        compress_head(mlp(), x, rank=4)
    with pytest.raises(InputError, match="at least 2 rows"):
        compress_head(mlp(), rows(1), rank=4)
    with pytest.raises(InputError, match="at least one"):
        compress_head(nn.Sequential(nn.ReLU()), rows(10), rank=4)
    with pytest.raises(InputError, match="inside a Sequential"):  # whose cost would not count
        compress_head(nn.Sequential(mlp(), nn.ReLU(), nn.Linear(4, 2)), rows(50), rank=1)
    hooked = mlp()
    hooked[2].register_forward_hook(lambda module, x, y: y.relu())
    with pytest.raises(InputError, match="output W x"):
        compress_head(hooked, rows(50), rank=4)
    with pytest.raises(InputError, match="prior"):
        compress_head(mlp(), rows(50), rank=4, prior=Moments.of(torch.randn(20, 61)))
