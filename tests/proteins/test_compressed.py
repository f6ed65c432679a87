"""A folder that `distil-rank compress model` wrote is a model like any other."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import distil_rank
from distil_rank.compress import storage
from distil_rank.compress.architectures import describe
from distil_rank.compress.models import compress_model
from distil_rank.compress.quantise import on_integers, quantise_model
from distil_rank.core.errors import InputError
from distil_rank.proteins import command_embed, compressed
from distil_rank.proteins.checkpoints import load_model
from distil_rank.proteins.esm2 import tokenise
from tests.compress.small_models import small_model, token_batches

PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "GAVLKK", "XBUZO"]


def made(kind, bits, folder):
    """A compressed model and its hidden states (n, l, d) and logits of PROTEINS."""
    dense = load_model(kind, head=True).model if kind == "nano-64" else small_model(kind)
    architecture, batches = describe(dense), token_batches(dense, rows=2)
    small, _ = compress_model(dense, batches, ranks=8, include=("*.0.*",), loss=None)
    if bits:
        small, _ = quantise_model(small, batches, bits)
    storage.save(small, folder, architecture)
    with torch.no_grad():
        on_integers(small, False)  # eight bits become floating-point weights
        return architecture.read(small, architecture.tokenise(PROTEINS))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed") / "small"
    return folder, made("nano-64", None, folder)


@pytest.mark.parametrize(
    ("kind", "bits"), [("esm2", 8), ("esm2", 4), ("EsmForMaskedLM", None), ("EsmModel", 8)]
)
def test_hidden_states_and_logits_are_those_of_the_compressed_model(kind, bits, tmp_path):
    hidden, logits = made(kind, bits, tmp_path / "small")
    tokens = tokenise(PROTEINS)
    model = load_model(str(tmp_path / "small"), head=logits is not None).model
    (ours,), scores = model(tokens)
    real = tokens != 1
    torch.testing.assert_close(ours[real], hidden[real], rtol=1e-5, atol=1e-5)
    if logits is not None:
        torch.testing.assert_close(scores[real], logits[real], rtol=1e-5, atol=1e-5)


def test_it_embeds_by_function_and_by_command(small, tmp_path):
    folder, (hidden, _) = small
    expected = torch.stack([h[1 : len(p) + 1].mean(0) for h, p in zip(hidden, PROTEINS)])
    found = distil_rank.embed(PROTEINS, model=str(folder), device="cpu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    records = "".join(f">p{i}\n{p}\n" for i, p in enumerate(PROTEINS))
    (tmp_path / "p.fasta").write_text(records)
    options = command_embed.Config(tmp_path / "p.fasta", str(folder), tmp_path / "store")
    command_embed.run(options)
    store = distil_rank.EmbeddingStore(tmp_path / "store")
    assert torch.equal(store[:], found) and store.provenance["model"] == "small"


def first_factor(description):
    return next(iter(description["factors"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: t.pop("layers.0.fc1.B.bias"), r"got no layers\.0\.fc1\.B\.bias"),
        (lambda d, t: t.update({"layers.9.x": torch.ones(1)}), r"got also layers\.9\.x"),
        (lambda d, t: d["config"].update(layers=3), r"layers\.3\.|of 3 layers"),
        (lambda d, t: d["config"].update(rope_theta=1.0), "wrong are: rope_theta"),
        (lambda d, t: d["config"].pop("eps"), "wrong are: eps"),
        (lambda d, t: d["factors"][first_factor(d)].update(d_in=9), "size mismatch"),
        (lambda d, t: d["factors"][first_factor(d)].update(rank=1), "size mismatch"),
        (lambda d, t: d["factors"][first_factor(d)].update(type="linear"), r"\.packed' required"),
        (lambda d, t: d.update(kind="head"), r"compressed ESM-2 required.*distil_rank\.load"),
    ],
)
def test_what_does_not_fit_is_one_sentence(small, tmp_path, change, message):
    description = json.loads((small[0] / compressed.DESCRIPTION).read_text())
    tensors = load_file(small[0] / compressed.WEIGHTS)
    change(description, tensors)
    (tmp_path / compressed.DESCRIPTION).write_text(json.dumps(description))
    save_file(tensors, tmp_path / compressed.WEIGHTS)
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path), head=True)
