"""Proteins as text: nothing lost on the way to tokens and back."""

import numpy as np
import pytest

from distil_rank.generators.data import END, encode, epoch_batches, parse, render
from tests.toys import toy_sequences


@pytest.mark.parametrize("length", [1, 59, 60, 61, 120, 150])
def test_text_is_protgpt2s_format_and_comes_back(length):
    sequence = "MKVLAAGWIC"[: length % 10] + "ACDEFGHIKL" * (length // 10)
    text = render(sequence)
    lines = text.split("\n")
    assert lines[0] == lines[-1] == END and 1 <= len(lines[-2]) <= 60
    assert all(len(line) == 60 for line in lines[1:-2])
    assert parse(text) == (sequence, True)
    assert parse(text.removesuffix(END)) == (sequence, False)


def test_tokens_come_back_as_text(tokenizer):
    for sequence in [*toy_sequences(5), "ACXBUZO" * 20]:
        ids = tokenizer(render(sequence))["input_ids"]
        assert ids[0] == ids[-1] == tokenizer.eos_token_id
        assert parse(tokenizer.decode(ids)) == (sequence, True)
        assert len(ids) == len(sequence) + -(-len(sequence) // 60) + 3
        assert encode([sequence], tokenizer).row(0).tolist() == ids


def test_protgpt2s_own_tokenizer_reads_and_returns_the_format(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "protgpt2_tokenizer")
    assert len(tokenizer) == 50257
    sequences = toy_sequences(4, low=70, high=150)
    encoded = encode(sequences, tokenizer)
    assert {tokenizer.decode([i]) for i in encoded.layout} == {END, "\n"}
    for i, sequence in enumerate(sequences):
        ids = encoded.row(i).tolist()
        assert ids[0] == ids[-1] == encoded.end
        assert parse(tokenizer.decode(ids)) == (sequence, True)


def test_batches_hold_every_protein_once_and_depend_on_seed_and_epoch_alone(proteins):
    batches = epoch_batches(proteins.lengths, 7, seed=3, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(40))
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        others = epoch_batches(proteins.lengths, 7, seed, epoch)
        same = np.array_equal(np.concatenate(batches), np.concatenate(others))
        assert same == ((seed, epoch) == (3, 0))


def test_a_batch_is_its_proteins_and_padding(proteins):
    tokens, mask = proteins.batch([3, 11])
    for row, i in enumerate((3, 11)):
        assert tokens[row][mask[row]].tolist() == proteins.row(i).tolist()
        assert (tokens[row][~mask[row]] == proteins.end).all()
    taken = proteins.take([11, 3])
    assert taken.row(0).tolist() == proteins.row(11).tolist() and len(taken) == 2
    assert len(proteins.take([])) == 0
