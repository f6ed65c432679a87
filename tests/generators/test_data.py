"""Proteins as text: nothing lost on the way to tokens and back, no relatives across splits."""

import gzip

import numpy as np
import pytest

from distil_rank.core.errors import InputError
from distil_rank.generators.data import (
    END,
    bpe_tokenizer,
    encode,
    epoch_batches,
    parse,
    prepare,
    read_sequences,
    render,
)
from tests.generators.conftest import toy_sequences


@pytest.mark.parametrize("length", [1, 59, 60, 61, 120, 150])
def test_text_is_protgpt2s_format_and_comes_back(length):
    sequence = "MKVLAAGWIC"[: length % 10] + "ACDEFGHIKL" * (length // 10)
    text = render(sequence)
    lines = text.split("\n")
    assert (
        lines[0] == lines[-1] == END
        and all(len(line) == 60 for line in lines[1:-2])
        and 1 <= len(lines[-2]) <= 60
    )
    assert parse(text) == (sequence, True)
    assert parse(text.removesuffix(END)) == (sequence, False)


def test_tokens_come_back_as_text(tokenizer):
    for sequence in [*toy_sequences(5), "ACXBUZO" * 20]:
        ids = tokenizer(render(sequence))["input_ids"]
        assert ids[0] == ids[-1] == tokenizer.eos_token_id and parse(tokenizer.decode(ids)) == (
            sequence,
            True,
        )
        assert len(ids) == len(sequence) + -(-len(sequence) // 60) + 3


def test_byte_pairs_come_back_and_are_fewer():
    sequences = ["MKTAYIAKQR" * 9, "GGSGGSGGSGAAAKVL" * 5]
    tokenizer = bpe_tokenizer(sequences * 5, 60)
    for sequence in [*sequences, *toy_sequences(3)]:
        ids = tokenizer(render(sequence))["input_ids"]
        assert parse(tokenizer.decode(ids)) == (sequence, True)
    assert len(tokenizer(render(sequences[0]))["input_ids"]) < 50
    assert len(tokenizer) <= 60 and not any("\n" in t for t in tokenizer.get_vocab() if t != "\n")


def test_protgpt2s_own_tokenizer_reads_and_returns_the_format(real_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_data / "protgpt2_tokenizer")
    assert len(tokenizer) == 50257
    sequences = toy_sequences(4, low=70, high=150)
    encoded = encode(sequences, tokenizer, 1024)
    for i, sequence in enumerate(sequences):
        ids = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]]
        assert ids[0] == ids[-1] == encoded.end and parse(tokenizer.decode(ids.tolist())) == (
            sequence,
            True,
        )


def test_every_kind_of_file_gives_the_same_sequences(tmp_path):
    import pyarrow
    import pyarrow.parquet

    sequences = toy_sequences(6)
    (tmp_path / "a.fasta").write_text(
        "".join(f">p{i} x\n{s.lower()}\n" for i, s in enumerate(sequences))
    )
    (tmp_path / "a.csv").write_text("name,sequence\n" + "".join(f"p,{s}\n" for s in sequences))
    (tmp_path / "a.tsv.gz").write_bytes(
        gzip.compress(("sequence\tfamily\n" + "".join(f"{s}\tPF1\n" for s in sequences)).encode())
    )
    pyarrow.parquet.write_table(pyarrow.table({"sequence": sequences}), tmp_path / "a.parquet")
    for name in ("a.fasta", "a.csv", "a.tsv.gz", "a.parquet"):
        assert read_sequences(tmp_path / name) == sequences


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.fasta", b"", "empty"),
        ("a.fasta", b">p\nMK1V\n", "1"),
        ("a.fasta", b"hello world", "FASTA"),
        ("a.csv", b"id,seq\n1,MK\n", "column named `sequence`"),
        ("a.csv", b"sequence\n", "no rows"),
        ("a.parquet", b"junk", "parquet"),
        ("none.fasta", None, "none"),
        ("none.csv", None, "none"),
        ("none.parquet", None, "none"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_sequences(tmp_path / name)


def mutated(sequence, rate, rng):
    letters = np.array(list(sequence))
    places = rng.random(len(letters)) < rate
    letters[places] = rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), places.sum())
    return "".join(letters)


def test_relatives_and_duplicates_never_straddle_the_splits():
    rng = np.random.default_rng(0)
    families = [
        [mutated(s, 0.2, rng) for _ in range(5)] for s in toy_sequences(20, low=90, high=140)
    ]
    sequences = [s for family in families for s in family]
    splits = prepare(sequences * 2, held_out=0.2)
    assert splits.counts["duplicates_removed"] == len(sequences)
    parts = [set(splits.train), set(splits.validation), set(splits.test)]
    assert sum(map(len, parts)) == len(sequences) and set.union(*parts) == set(sequences)
    assert splits.made["method"] == "pyswrd" and splits.made["version"]
    assert all(any(part >= set(family) for part in parts) for family in families)


def test_share_subsamples_training_only_and_grows_by_inclusion():
    sequences = toy_sequences(200)
    whole, fifth, tenth = (prepare(sequences, proportion=p) for p in (1.0, 0.2, 0.1))
    for part, share in ((fifth, 0.2), (tenth, 0.1)):
        assert len(part.train) == round(share * len(whole.train))
    assert set(tenth.train) < set(fifth.train) < set(whole.train)
    assert whole.test == fifth.test == tenth.test and whole.validation == tenth.validation


def test_long_proteins_are_left_out_and_counted_or_refused(tokenizer):
    sequences = [*toy_sequences(50), "A" * 300]
    assert prepare(sequences, max_length=100).counts["too_long_left_out"] == 1
    with pytest.raises(InputError, match="at most 128 tokens per protein required, got 1 longer"):
        encode(sequences, tokenizer, 128)
    with pytest.raises(InputError, match="train-size-prop"):
        prepare(sequences, proportion=0.0)


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
        wanted = proteins.tokens[proteins.offsets[i] : proteins.offsets[i + 1]].tolist()
        assert tokens[row][mask[row]].tolist() == wanted
        assert (tokens[row][~mask[row]] == proteins.end).all()
