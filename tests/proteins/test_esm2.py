import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from distil_rank.core.errors import InputError
from distil_rank.proteins.checkpoints import load_model
from distil_rank.proteins.esm2 import CLS, EOS, MASK, PAD, TOKENS, Output, tokenise
from distil_rank.proteins.pooling import embed
from tests.proteins import reference

SIZES = ("8m", "35m", "150m", "650m", "3b")
sequences = st.text(alphabet="LAGVSERTIDPKQNFYMHWCXBUZO.-", min_size=1, max_size=60)


def distance(x, y):
    """Largest relative distance between corresponding rows."""
    return ((x - y).norm(dim=-1) / y.norm(dim=-1)).max().item()


def test_tokens_are_the_alphabet_of_fair_esm(fair_esm):
    assert list(TOKENS) == fair_esm.alphabet.all_toks
    assert tuple(
        getattr(fair_esm.alphabet, name)
        for name in ("cls_idx", "padding_idx", "eos_idx", "mask_idx")
    ) == (CLS, PAD, EOS, MASK)


@given(batch=st.lists(sequences, min_size=1, max_size=5))
def test_tokens_equal_those_of_fair_esms_batch_converter(fair_esm, batch):
    _, _, expected = fair_esm.alphabet.get_batch_converter()([("", sequence) for sequence in batch])
    assert torch.equal(tokenise(batch), expected)


@pytest.mark.parametrize("letter", ["J", "*", "a", " ", "é", "7"])
def test_letters_without_a_token_are_refused(letter):
    with pytest.raises(InputError, match=r"letters of .* required"):
        tokenise(["MK" + letter])


@pytest.mark.parametrize("size", SIZES)
def test_data_path_equals_the_reference_outputs_of_the_real_models(shared_data, size):
    """Tokens, mask and pooled rows, exactly, on what the published checkpoints got and gave."""
    data = load_file(shared_data / "esm2_reference_outputs" / f"esm2_{size}.safetensors")
    ids, state, residues = (
        data["input__input_ids"],
        data["output__last_hidden_state"],
        data["residue_mask"],
    )
    proteins = ["".join(TOKENS[i] for i in row[mask]) for row, mask in zip(ids, residues)]

    tokens = tokenise(proteins)
    assert torch.equal(tokens, ids)
    assert torch.equal(tokens != PAD, data["input__attention_mask"].bool())

    class Published:
        """Answers each protein with the published hidden state of the same protein."""

        embed_tokens = torch.nn.Embedding.from_pretrained(torch.zeros(1, 1))

        def __call__(self, tokens, layers, logits):
            rows = [
                next(i for i, p in enumerate(ids) if torch.equal(p[p != PAD], t[t != PAD]))
                for t in tokens
            ]
            return Output([state[rows, : tokens.shape[1]]], None)

    for i, vectors in embed(Published(), proteins, pool="residues"):
        assert torch.equal(vectors[0], state[i][residues[i]])
    for i, vectors in embed(Published(), proteins, pool="mean"):
        torch.testing.assert_close(
            vectors[0, 0], state[i][residues[i]].mean(0), rtol=1e-5, atol=1e-6
        )
    for i, vectors in embed(Published(), proteins, pool="bos"):
        assert torch.equal(vectors[0, 0], state[i, 0])


@pytest.mark.parametrize("heads", [(3, 48, 4), (2, 40, 2), (2, 60, 5)])
def test_forward_equals_fair_esm_for_every_residue_alone_or_in_any_batch(tmp_path, heads):
    theirs = reference.fair_esm_model(*heads, seed=1)
    reference.save_fair_esm(theirs, tmp_path / "model.pt")
    ours = load_model(str(tmp_path / "model.pt")).model
    draw = random.Random(0)
    proteins = [reference.random_sequence(draw, length) for length in (1, 2, 30, 77, 300)]
    depth = heads[0]
    together = ours(tokenise(proteins), range(depth + 1)).hidden
    for i, protein in enumerate(proteins):
        alone = ours(tokenise([protein]), range(depth + 1)).hidden
        for layer in range(depth + 1):
            expected = reference.hidden(theirs, protein, layer)
            assert distance(alone[layer][0], expected) < 1e-5
            assert distance(together[layer][i, : len(protein) + 2], expected) < 1e-5


def test_masked_tokens_are_dropped_and_compensated_as_in_fair_esm(fair_esm, ours):
    tokens = tokenise(["MKTAYIAKQRQISFVKSHFSRQ", "GAVLKK"])
    tokens[0, [3, 7, 8]] = MASK
    tokens[1, 2] = MASK
    real = tokens != PAD
    with torch.no_grad():
        expected = fair_esm(tokens, repr_layers=[3])
        (hidden,), logits = ours(tokens)
    assert distance(hidden[real], expected["representations"][3][real]) < 1e-5
    assert distance(logits[real], expected["logits"][real]) < 1e-5


def test_logits_may_be_asked_for_at_some_places_or_not_at_all(ours, checkpoint):
    tokens = tokenise(["MKTAYIAKQRQISFVKSHFSRQ", "GAVLKK"])
    places = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    with torch.no_grad():
        whole = ours(tokens)
        for layers in ((), (0,), (-1, 1)):
            some = ours(tokens, layers, places)
            assert len(some.hidden) == len(layers)
            torch.testing.assert_close(some.logits, whole.logits[places], rtol=1e-5, atol=1e-5)
        assert ours(tokens, logits=False).logits is None
        assert torch.equal(ours(tokens, logits=False).hidden[0], whole.hidden[0])
    headless = load_model(str(checkpoint)).model
    assert headless(tokens).logits is None
    assert torch.equal(headless(tokens).hidden[0], whole.hidden[0])
    with pytest.raises(InputError, match="load it with head=True"):
        headless(tokens, (), places)


@pytest.mark.parametrize("wrong", ["MKT", ["MKT", ""]])
def test_a_bare_string_and_an_empty_sequence_are_refused(ours, wrong):
    for function in (tokenise, lambda sequences: list(embed(ours, sequences))):
        with pytest.raises(InputError, match="a list of sequences"):
            function(wrong)


def test_bfloat16_keeps_the_residual_stream_in_float32(fair_esm, checkpoint):
    model = load_model(str(checkpoint), dtype="bfloat16").model
    assert (
        model.layers[0].fc1.weight.dtype == torch.bfloat16
        and model.embed_tokens.weight.dtype == torch.float32
    )
    protein = reference.random_sequence(random.Random(3), 100)
    (hidden,), _ = model(tokenise([protein]))
    assert hidden.dtype == torch.float32
    assert 1e-5 < distance(hidden[0], reference.hidden(fair_esm, protein, 3)) < 0.02


def test_layers_count_from_either_end(ours):
    assert ours.depths([-1, 0, 3, -4, 2]) == [3, 0, 3, 0, 2]
    for wrong in (4, -5):
        with pytest.raises(InputError, match=r"layers between -4 and 3 .* required"):
            ours.depths([wrong])
