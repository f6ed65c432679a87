"""Compressing whole models: exact at full rank, within budget, never slower, two runs equal."""

import copy

import pytest
import torch
from torch import nn

from distil_rank.compress.architectures import describe
from distil_rank.compress.calibration import collect, load_prior, save_prior
from distil_rank.compress.evaluate import compare
from distil_rank.compress.fisher import DAMPING, metrics
from distil_rank.compress.models import compress_model
from distil_rank.compress.sites import find_sites, trace
from distil_rank.core.errors import InputError
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from tests.compress.small_models import CLASSIFIERS, KINDS, output, small_model, thin, token_batches


def students(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, LowRankLinear)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequential", [False, True])
def test_layers_of_low_rank_are_kept_exactly(kind, sequential):
    model = thin(small_model(kind), rank=4)
    batches = token_batches(model)
    small, report = compress_model(model, batches, ranks=4, sequential=sequential)
    assert len(students(small)) == sum(x.rank is not None for x in report.layers) >= 8
    dense, compressed = output(model, batches[0]), output(small, batches[0])
    assert float((dense - compressed).abs().max() / dense.abs().max()) < (
        1e-4 if sequential else 1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_is_kept_and_the_model_is_not_changed(kind):
    model = small_model(kind)
    before = copy.deepcopy(model.state_dict())
    batches = token_batches(model)
    small, report = compress_model(model, batches[:2], ratio=0.5, held_out=batches[2:])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    called = [x for x in report.layers if x.note != "not called in the forward pass"]
    assert sum(x.parameters_after for x in called) <= 0.5 * sum(x.parameters for x in called)
    assert report.parameters_after == sum(p.numel() for p in small.parameters()) < report.parameters
    for layer in report.layers:
        if layer.rank is not None:
            assert layer.parameters_after < layer.parameters
            assert layer.held_out_floor <= layer.held_out_loss + 1e-7
            assert students(small)[layer.name].rank == layer.rank


def test_tied_uncalled_and_small_layers_stay_dense_and_the_report_says_so():
    model = small_model("EsmForMaskedLM")
    small, report = compress_model(model, token_batches(model), ratio=0.5)
    names = {x.name: x for x in report.layers}
    assert "lm_head.decoder" not in names  # tied to the embedding
    assert names["esm.contact_head.regression"].note == "not called in the forward pass"
    assert not small.training and not model.training
    probes = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    assert compress_model(probes, [(torch.randn(50, 40),)], ratio=0.5)[0].training  # as it was
    assert small.lm_head.decoder.weight is small.esm.embeddings.word_embeddings.weight
    _, report = compress_model(model, token_batches(model), ranks=20)  # 20 (32 + 32) > 32 * 32
    assert {x.note for x in report.layers if x.d_in == x.d_out == 32} == {
        "factors would not be smaller"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count_and_start_and_end_do(kind):
    """More padding changes nothing, and moments count every token that the model reads."""
    model = small_model(kind)
    architecture = describe(model)
    (batch,) = token_batches(model, count=1)
    bare = torch.is_tensor(batch)
    tokens = batch if bare else batch["input_ids"]
    mask = tokens != 1 if bare else batch["attention_mask"].bool()
    wide = nn.functional.pad(tokens, (0, 7), value=0 if architecture.task == "causal" else 1)
    padded = architecture.batch(wide, nn.functional.pad(mask, (0, 7)))
    assert int(mask.sum()) == int(architecture.residues(batch).sum()) + 2 * len(tokens)
    sites = find_sites(model, exclude=("*contact_head*", "*decoder*", "lm_head"))
    found = [list(collect(model, [b], trace(model, [b], sites))) for b in (batch, padded)]
    for a, b in zip(*found):
        assert a.moments.count == b.moments.count == int(mask.sum())
        torch.testing.assert_close(a.moments.scatter, b.moments.scatter, rtol=1e-4, atol=1e-5)


def test_start_and_end_are_served_as_residues_are():
    """Three letters, start and end span five inputs of the first layer: rank 6 loses nothing."""
    model = small_model("esm2")
    batches = [torch.tensor([[0, 5, 6, 7, 6, 5, 2], [0, 7, 7, 6, 5, 2, 1]])]
    include = ("layers.0.self_attn.?_proj",)
    small, report = compress_model(model, batches, ranks=6, include=include)
    assert len(report.layers) == 3
    with torch.no_grad():
        expected, got = (m(batches[0]).logits[batches[0] != 1] for m in (model, small))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_square_batches_are_not_transposed():
    """fair-esm works on (T, B, d): with B = T only a trace can tell how rows lie."""
    model = small_model("fair-esm")
    (batch,) = token_batches(model, count=1, rows=14, length=14)
    sites = find_sites(model, include=("layers.0.fc1",))
    (square,) = collect(model, [batch], trace(model, [batch], sites))
    (single,) = collect(model, [row[None] for row in batch], trace(model, [batch[:1]], sites))
    assert square.moments.count == single.moments.count
    torch.testing.assert_close(square.moments.mean, single.moments.mean, rtol=1e-5, atol=1e-6)


def test_layer_groups_give_the_same_model_in_less_memory():
    model = small_model("esm2")
    batches = token_batches(model)
    whole, _ = compress_model(model, batches, ratio=0.5)
    parts, _ = compress_model(model, batches, ratio=0.5, memory=1)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values())
    )


def test_sequential_repairs_drift():
    """Hidden states of the sequential model are closer to the dense ones."""
    model = small_model("EsmForMaskedLM", layers=3)
    batches = token_batches(model, count=4, rows=8, length=40)
    errors = []
    for sequential in (False, True):
        small, _ = compress_model(model, batches, ratio=0.5, sequential=sequential, loss=None)
        errors.append(
            sum(float((output(small, b) - output(model, b)).square().sum()) for b in batches)
        )
    assert errors[1] < 0.9 * errors[0]


def test_the_metric_is_that_of_gradients_with_labels_drawn_from_the_model():
    model = small_model("esm2")
    architecture = describe(model)
    batches = architecture.calibration(token_batches(model))
    name = "layers.1.fc2"
    sites = trace(model, batches, find_sites(model, include=(name,)))
    found = metrics(model, batches, sites, architecture.loss)[name]
    expected, rows = torch.zeros(32, 32, dtype=torch.float64), 0
    draws = generator(0, "labels drawn from the model")
    for batch in batches:
        kept = []
        handle = model.layers[1].fc2.register_forward_hook(
            lambda m, i, o, kept=kept: kept.append(o.requires_grad_()) or 1 * o
        )
        with torch.enable_grad():
            value = architecture.loss(model, batch, draws)
        (gradient,) = torch.autograd.grad(value, kept[-1:])
        handle.remove()
        for row in gradient[batch != 1].double():
            expected, rows = expected + row.outer(row), rows + 1
    expected /= rows
    expected += DAMPING * expected.trace() / 32 * torch.eye(32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["esm2", "EsmModel", *CLASSIFIERS])
def test_the_metric_of_the_function_loses_less_of_it(kind):
    model = small_model(kind, layers=3)
    architecture = describe(model)
    batches = architecture.calibration(token_batches(model, count=4, rows=8, length=40))
    key = "logits_kl" if architecture.task != "hidden" else "hidden_fvu"
    losses = []
    for loss in (None, architecture.loss):
        small, _ = compress_model(model, batches, ratio=0.5, loss=loss)
        losses.append(compare(architecture, model, small, batches)[key]["value"])
    assert losses[1] < losses[0]


def test_a_layer_that_the_loss_does_not_read_stays_dense():
    probes = nn.ModuleDict({"a": nn.Linear(40, 40), "b": nn.Linear(40, 40)})
    probes.forward = lambda x: probes["a"](x) + 0 * probes["b"](x).detach()
    _, report = compress_model(probes, [torch.randn(50, 40)], ratio=0.9)
    assert [x.note for x in report.layers] == ["", "the loss does not depend on it"]


def test_folds_are_proteins():
    """One batch or several, in any layout: protein i is in fold i modulo the number of folds."""
    for kind in ("esm2", "fair-esm"):
        model = small_model(kind)
        (batch,) = token_batches(model, count=1, rows=5)
        sites = find_sites(model, include=("layers.0.fc1",))
        for batches in ([batch], [batch[:2], batch[2:]]):
            (found,) = collect(model, batches, trace(model, batches, sites), folds=3)
            lengths = (batch != 1).sum(1).tolist()
            assert [m.count for m in found.folds] == [sum(lengths[f::3]) for f in range(3)]
    model = nn.Sequential(nn.Linear(8, 8))  # rows that belong to nobody: by batch
    batches = list(torch.randn(4, 10, 8))
    (found,) = collect(model, batches, trace(model, batches, find_sites(model)), folds=3)
    assert [m.count for m in found.folds] == [20, 10, 10]


class InPlace(nn.Module):
    """Linear layers that read one tensor, which is changed in place after each of them."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ([nn.Linear(24, 24), nn.Linear(24, 24)] for _ in range(3))
        self.blocks = nn.ModuleList(nn.Sequential(*pair) for pair in pairs)

    def forward(self, x):
        h = 1 * x
        for block in self.blocks:
            for layer in block:
                h += layer(h).relu_()
        return h


@pytest.mark.parametrize("sequential", [False, True])
def test_a_tensor_changed_in_place_is_another_input(sequential):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InPlace()
    x = torch.randn(400, 24, generator=torch.Generator().manual_seed(1))
    options = {"ranks": 8, "held_out": [(x,)], "sequential": sequential, "loss": None}
    small, report = compress_model(model, [(x,)], **options)
    for layer in report.layers:  # fitted and measured on the same rows: the plain optimum is there
        if not sequential or layer.name.startswith("blocks.0"):
            assert layer.held_out_loss == pytest.approx(layer.held_out_floor, rel=1e-4)
    if sequential:  # closer than blocks fitted to the dense model's activations
        plain, _ = compress_model(model, [(x,)], ranks=8, loss=None)
        with torch.no_grad():
            errors = [float((m(x) - model(x)).square().sum()) for m in (plain, small)]
        assert errors[1] < errors[0]


def test_priors_round_trip_and_are_checked(tmp_path):
    model = small_model("esm2")
    batches = token_batches(model)
    sites = trace(model, batches, find_sites(model, include=("layers.*",)))
    found = list(collect(model, batches, sites))
    save_prior(tmp_path / "prior.safetensors", found, model="small")
    loaded = load_prior(tmp_path / "prior.safetensors")
    assert loaded.keys() == {s.name for s in sites}
    for statistics in found:
        for site in statistics.sites:
            side, moments = loaded[site.name]
            assert side == statistics.side
            assert torch.equal(moments.scatter, statistics.moments.scatter)
    q, k = (loaded[f"layers.0.self_attn.{name}_proj"][1] for name in "qk")
    assert q is k  # stored once
    Moments.of(torch.randn(20, 8)).save(tmp_path / "plain.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("plain", "broken", "absent"):
        with pytest.raises(InputError, match="moments"):
            load_prior(tmp_path / f"{name}.safetensors")


def test_a_models_prior_improves_a_model_fitted_on_little():
    model = small_model("EsmModel")
    exclude = ("*contact*", "*pooler*")
    many, tests = token_batches(model, count=12, seed=1), token_batches(model, count=4, seed=2)
    found = collect(model, many, trace(model, many, find_sites(model, exclude=exclude)))
    prior = {site.name: (s.side, s.moments) for s in found for site in s.sites}
    few = token_batches(model, count=5, rows=1, length=9, seed=3)
    options = {"ranks": 8, "held_out": tests, "exclude": exclude}
    _, alone = compress_model(model, few, **options)
    _, helped = compress_model(model, few, prior=prior, **options)
    assert helped.mean_fvu < alone.mean_fvu
    assert any(x.prior_weight for x in helped.layers)


def test_bad_input():
    model = small_model("esm2")
    batches = token_batches(model)
    for arguments, message in (
        ({"ratio": 0.0}, "ratio must be"),
        ({"ratio": 1.5}, "ratio must be"),
        ({"ratio": float("nan")}, "ratio must be"),
        ({}, "exactly one of ratio and ranks"),
        ({"ratio": 0.5, "include": ("nothing",)}, "pattern"),
        ({"ratio": 0.001}, "budget"),
        ({"ranks": 0}, "rank of at least 1"),
        ({"ratio": 0.5, "prior": {"other": None}}, "prior moments"),
    ):
        with pytest.raises(InputError, match=message):
            compress_model(model, batches, **arguments)
    with pytest.raises(InputError, match="calibration batch"):
        compress_model(model, [], ratio=0.5)
    with pytest.raises(InputError, match="2 calibration tokens"):
        compress_model(model, [torch.tensor([[0, 1, 1]])], ratio=0.5)
    with pytest.raises(InputError, match="linear layer"):
        compress_model(nn.Sequential(nn.ReLU()), [torch.randn(3, 4)], ratio=0.5)
    broken = copy.deepcopy(model)
    broken.layers[0].fc1.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="finite activations required, layer layers"):
        compress_model(broken, batches, ratio=0.5)
