"""Any nn.Module: compressed, run, saved, loaded, equal."""

import pytest
import torch
from torch import nn

import distil_rank
from distil_rank.compress import storage
from distil_rank.compress.fisher import outputs_of
from distil_rank.compress.models import compress_model
from distil_rank.compress.sites import call
from distil_rank.core.linear import LowRankLinear, PrunedLinear
from tests.compress.small_models import thin

SMALL = {"vocab_size": 30, "pad_token_id": 1}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
TRANSFORMERS = {
    "BertModel": BERT,
    "BertForMaskedLM": BERT,
    "RobertaForSequenceClassification": {**BERT, "max_position_embeddings": 40},
    "EsmForTokenClassification": {**BERT, "position_embedding_type": "rotary"},
    "DistilBertModel": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "T5EncoderModel": {**T5, "decoder_start_token_id": 1},
    "T5GatedEncoderModel": {**T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 1},
    "GPT2Model": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
}


class Experts(nn.Module):
    """Every row goes to one of four experts, which see no row of some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        chosen, y = self.route(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return x + y


class Called(nn.Module):
    """Layers called by keyword, whose weight and dtype are read, before a residual in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x):
        h = self.up(input=x.to(self.up.weight.dtype)).relu()
        x = 1 * x
        x += self.down(input=h)
        return {"hidden": x, "shape": self.down.weight.shape}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.GRU(32, 32, batch_first=True), nn.Linear(32, 40)

    def forward(self, x, scale):
        hidden, last = self.inner(x)
        return self.outer(hidden) * scale, last


def made(kind: str) -> tuple[nn.Module, list]:
    """A model with random weights and two batches for it."""
    draws = torch.Generator().manual_seed(1)
    rows = list(torch.randn(2, 6, 20, 32, generator=draws))
    torch.manual_seed(0)
    if kind == "TransformerEncoder":
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), rows
    if kind == "Experts":
        return Experts().eval(), rows
    if kind == "Called":
        return Called().eval(), [{"x": x} for x in rows]
    if kind == "Recurrent":
        return Recurrent().eval(), [(x, 0.5) for x in rows]
    import transformers

    cls = getattr(transformers, kind.replace("Gated", ""))
    model = cls(cls.config_class(**SMALL | TRANSFORMERS[kind])).eval()
    tokens = torch.randint(2, 30, (2, 6, 20), generator=draws)
    mask = torch.arange(20) < torch.tensor([20, 15, 20, 9, 12, 20])[:, None]
    names = ("input_ids", "attention_mask")
    return model, [dict(zip(names, (t.masked_fill(~mask, 1), mask.long()))) for t in tokens]


def answers(model: nn.Module, batch) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(outputs_of(call(model, batch)))


@pytest.mark.parametrize(
    "kind", [*TRANSFORMERS, "TransformerEncoder", "Experts", "Called", "Recurrent"]
)
def test_compressed_run_saved_and_loaded(kind, tmp_path):
    with torch.random.fork_rng(devices=[]):
        model, batches = made(kind)
        dense, _ = made(kind)
    small, report = compress_model(model, batches, ratio=0.7, held_out=batches)
    replaced = [p for p in small.modules() if isinstance(p, LowRankLinear | PrunedLinear)]
    assert len(replaced) == sum(x.parameters_after < x.parameters for x in report.layers) > 0
    assert report.parameters_after < report.parameters
    for layer in report.layers:
        if layer.held_out_loss is not None:
            assert layer.held_out_loss == pytest.approx(layer.held_out_floor, rel=1e-3, abs=1e-6)
    expected, found = answers(model, batches[0]), answers(small, batches[0])
    assert [y.shape for y in found] == [y.shape for y in expected]
    storage.save(small, tmp_path)
    known = kind in TRANSFORMERS  # which are rebuilt from their configuration
    loaded = distil_rank.load(tmp_path) if known else distil_rank.load(tmp_path, model=dense)
    assert all(map(torch.equal, found, answers(loaded, batches[0])))
    full, _ = compress_model(thin(model), batches, ranks=4)
    for a, b in zip(answers(model, batches[0]), answers(full, batches[0])):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
