"""The linear student of a function: the layer is its special case, and the certificate measures."""

import pytest
import torch
from torch import nn

from distil_rank.core.agreement import function_kept, measure_for, neighbors_kept
from distil_rank.core.errors import InputError
from distil_rank.core.functions import RIDGES, distill_function, drawn_rows, mean_jacobian
from distil_rank.core.lowrank import Joint, optimum
from distil_rank.core.moments import Moments
from tests.core.rows import draw, layer, loss, rows


def head(d: int = 24) -> nn.Sequential:
    return nn.Sequential(layer(32, d), nn.Tanh(), layer(10, 32, seed=20))


def cloud(n: int, seed: int = 1) -> torch.Tensor:
    return draw(n, 24, seed=seed) @ (0.3 * draw(24, 24, seed=2)) + 0.2


@pytest.mark.parametrize("n", [12, 90])
def test_for_a_linear_function_it_is_the_layers_optimum(n):
    x, first, second = rows(n=n), layer(30), layer(12, 30, seed=8)
    W, c = (second.weight @ first.weight).detach(), second(first.bias).detach()
    for f, weight, bias in (
        (first, first.weight, first.bias),
        (nn.Sequential(first, second), W, c),
    ):
        student, certificate = distill_function(f, x, 6)
        best = optimum(weight, bias, Moments.of(x), 6)
        y, found = best.student(6)(x).detach(), student(x).detach()
        assert float((found - y).norm() / y.norm()) < 1e-12
        assert certificate.ridge is None and certificate.linear_fvu < 1e-20
        assert certificate.achieved_fvu == pytest.approx(float(best.fvu[6]), abs=1e-12)


@pytest.mark.parametrize("inputs", ["data", "drawn"])
def test_the_certificate_is_what_the_student_does(inputs):
    f, x, held = head(), cloud(400), cloud(300, seed=3)
    student, certificate = distill_function(f, x, 4, inputs, held)
    with torch.no_grad():
        for rows_, prefix in ((x, ""), (held, "held_out_")):
            y = f(rows_)
            lost = loss(student(rows_), y) / loss(y.mean(0), y)
            found = {k: getattr(certificate, f"{prefix}{k}_fvu") for k in ("achieved", "floor")}
            assert found["achieved"] == pytest.approx(lost, rel=1e-9)
            U = torch.linalg.svd(y - y.mean(0)).Vh[:4]
            best = y.mean(0) + (y - y.mean(0)) @ U.T @ U
            assert found["floor"] == pytest.approx(loss(best, y) / loss(y.mean(0), y), rel=1e-6)
            assert found["floor"] < found["achieved"] < 0.5
    assert certificate.rank_fvu > 0 and certificate.ridge in (None, *RIDGES)
    again = distill_function(f, x, 4, inputs, held)
    assert torch.equal(again[0].A.weight, student.A.weight) and again[1] == certificate


def test_many_rows_give_reduced_rank_regression():
    f, x = head(), cloud(4000)
    with torch.no_grad():
        joint = Joint.of(Moments.of(torch.cat([x, f(x)], 1)), 24)
        plain = joint.optimum(torch.zeros(10, 24), 1e-7).student(5)
        student, _ = distill_function(f, x, 5)
        y = f(x)
        assert loss(student(x), y) < 1.001 * loss(plain(x), y)


def test_few_rows_gain_by_the_jacobian_and_without_it_by_drawn_rows():
    f, held = head(), cloud(2000, seed=3)
    lost = {"data": 0.0, "drawn": 0.0, "no derivatives": 0.0, "no derivatives, drawn": 0.0}
    for seed in range(2):
        x = cloud(20, seed=10 + seed)
        for form in lost:
            inputs = "drawn" if form.endswith("drawn") else "data"
            function = torch.no_grad()(f) if form.startswith("no") else f
            certificate = distill_function(function, x, 6, inputs, held)[1]
            lost[form] += certificate.held_out_achieved_fvu
    assert max(lost["data"], lost["no derivatives, drawn"]) < 0.6 * lost["no derivatives"]
    assert lost["drawn"] < lost["data"]


def test_the_mean_jacobian_and_the_drawn_rows_are_what_they_say():
    f, x = head(), cloud(40)
    J = torch.stack([torch.autograd.functional.jacobian(f, row) for row in x]).mean(0)
    torch.testing.assert_close(mean_jacobian(f, x, 10), J)
    x = cloud(500)
    rows_ = drawn_rows(x, 1.0, 20_000, seed=0)
    own = Moments.of(x)
    torch.testing.assert_close(rows_.mean(0), own.mean, rtol=0, atol=0.1)
    expected = (2 / 3 + 1) * own.covariance  # mixing leaves 2/3 of it, the noise adds one
    assert float((Moments.of(rows_).covariance - expected).norm() / expected.norm()) < 0.08


def test_bad_functions_and_rows():
    x = cloud(50)
    for f, message in (
        (nn.Sequential(layer(), nn.Dropout()), "evaluation mode"),
        (lambda x: x - x.mean(0), "one row at a time"),
        (lambda x: x.sum(), "outputs"),
        (lambda x: x / 0, "finite outputs"),
    ):
        with pytest.raises(InputError, match=message):
            distill_function(f, x, 2)
    with pytest.raises(InputError, match="finite rows"):
        distill_function(head(), x / 0, 2)
    with pytest.raises(InputError, match="'drawn' required"):
        distill_function(head(), x, 2, inputs="all")
    with pytest.raises(ValueError, match="rank must be"):
        distill_function(head(), x, 11)


def test_what_is_kept_of_a_function():
    y = draw(200, 30, seed=1)
    turned = 3 * y @ torch.linalg.qr(draw(30, 30, seed=2)).Q + 1  # keeps every distance
    assert function_kept(y, turned, "neighbors")["value"] == 1
    random = function_kept(y, draw(200, 30, seed=3), "neighbors")
    assert random["low"] < 10 / 199 < random["high"]
    near, far = (
        torch.cdist(x, x).fill_diagonal_(1e9).topk(10, largest=False).indices.tolist()
        for x in (y, turned.abs())
    )
    slow = [len(set(a) & set(b)) / 10 for a, b in zip(near, far)]
    assert neighbors_kept(y, turned.abs()).tolist() == pytest.approx(slow)
    assert function_kept(y[:, :1], y[:, :1].exp(), "spearman")["value"] == pytest.approx(1)
    assert function_kept(y[:, :4], 2 * y[:, :4], "top1")["value"] == 1
    assert [measure_for(n) for n in (1, 2, 128)] == ["spearman", "top1", "neighbors"]
    assert measure_for(8, vector=True) == "neighbors"
    with pytest.raises(InputError, match="one"):
        function_kept(y[:, :1], 0 * y[:, :1], "spearman")
    with pytest.raises(InputError, match="more than 10 rows"):
        function_kept(y[:10], y[:10], "neighbors")
