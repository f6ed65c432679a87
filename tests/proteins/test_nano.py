"""The committed nano models, their card and the embeddings made with them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import nano, nano_additive
from benchmarks.nano_perplexity import masked_losses, perplexity
from distil_rank.core.records import ROOT, read_json, sha256
from distil_rank.proteins.checkpoints import FAMILIES, load_model
from distil_rank.proteins.command_pretrain import Config
from distil_rank.proteins.esm2 import tokenise
from distil_rank.proteins.pretrain import new_model
from distil_rank.proteins.splits import near_relatives

NAMES = list(FAMILIES["nano"].values())
MODELS = ROOT / "models"


@pytest.fixture(scope="module")
def card() -> dict:
    return read_json(MODELS / "nano.json", "nano/1")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_card_and_load_by_name(name, card):
    loaded, known = load_model(name), card["models"][name]
    assert {loaded.sha256, known["sha256"]} == {sha256(MODELS / f"{name}.pt")}
    shape = loaded.model.width, loaded.model.depth
    assert shape == (known["config"]["n_embd"], known["config"]["n_layer"])


def test_the_family_is_small():
    assert sum((MODELS / f"{name}.pt").stat().st_size for name in NAMES) <= 24 * 2**20


def test_every_size_knows_more_than_frequencies_and_pairs_of_neighbours(card):
    assert card["data"]["additive"] < card["data"]["unigram"]
    for one in (card["models"][name] for name in NAMES):
        assert one["perplexity"]["high"] < 0.7 * one["perplexity_untrained"]
        assert one["perplexity"]["high"] < card["data"]["unigram"]
        assert one["perplexity_over_additive"]["high"] < 1


def test_without_neighbours_the_additive_model_is_dirichlet_multinomial():
    model = nano_additive.Additive()
    with torch.no_grad():
        model.frequencies.normal_(generator=torch.Generator().manual_seed(0))
    tokens = tokenise(["ACDAAX", "MKV"])
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[0, 1] = True  # the first A; seen are C, D, A, A
    f, alpha = model.frequencies.softmax(0), model.concentration.exp()
    counts = torch.bincount(tokenise(["CDAA"])[0, 1:-1], minlength=33)
    torch.testing.assert_close(model(tokens, chosen)[0].exp(), (counts + alpha * f) / (4 + alpha))


def test_the_additive_model_finds_a_rule_between_neighbours():
    rng = random.Random(0)
    proteins = [
        "KL" * rng.randint(5, 15) if rng.random() < 0.5 else "LK" * rng.randint(5, 15)
        for _ in range(300)
    ]
    config = Config(Path("x"), Path("y"), tokens=1e5, batch_tokens=300, max_length=40)
    model = nano_additive.train(proteins, config)
    sums, counts = masked_losses(model, proteins[:50])
    model.neighbours.data.zero_()
    blind, _ = masked_losses(model, proteins[:50])
    assert sums.sum() / counts.sum() < 0.3
    assert blind.sum() / counts.sum() > 0.6


def test_the_card_says_whether_perplexity_falls_with_size(card):
    assert f"**Size**: {nano.size_verdict(card['models'])}" in (MODELS / "README.md").read_text()


@pytest.mark.parametrize(
    "low, high, word",
    [(0.98, 0.999, "falls"), (0.99, 1.01, "cannot be told apart"), (1.001, 1.02, "rises")],
)
def test_the_words_about_size_follow_the_interval(low, high, word):
    ratio = {"value": (low + high) / 2, "low": low, "high": high}
    assert nano.size_verdict(
        {"small": {}, "large": {"perplexity_over_next_smaller": ratio}}
    ).startswith(f"perplexity {word} from small to large (")


def test_embeddings_at_the_top_level_are_real_held_out_proteins(card):
    train, val = (
        torch.load(ROOT / f"embeddings_{part}.pt", weights_only=True) for part in ("train", "val")
    )
    record = json.loads((ROOT / "embeddings.json").read_text())
    assert train.dtype == val.dtype == torch.float16
    assert train.shape[1] == val.shape[1] == 256
    assert (len(train), len(val)) == (record["n_train"], record["n_val"])
    assert len(train) + len(val) >= 5000
    assert torch.isfinite(torch.cat([train, val])).all()
    assert len(train.unique(dim=0)) == len(train)
    assert record["weights_sha256"] == card["models"]["nano-256"]["sha256"]
    sizes = [(ROOT / f"embeddings_{part}.pt").stat().st_size for part in ("train", "val")]
    assert sum(sizes) <= 16 * 2**20


def test_location_is_read_better_from_the_largest_than_from_composition(card):
    record = read_json(ROOT / "benchmarks" / "results" / "nano_deeploc.json", "nano-deeploc/1")
    assert record["weights_sha256"]["nano-256"] == card["models"]["nano-256"]["sha256"]
    assert record["results"]["nano-256"]["accuracy_above_composition"]["low"] > 0


@pytest.fixture(scope="module")
def parts():
    from benchmarks import nano_data

    if not nano_data.DATA.is_dir():
        pytest.skip("real data is not here: set DISTIL_RANK_DATA to its folder")
    return nano_data.split()


@pytest.mark.slow
def test_the_split_is_rebuilt_and_cuts_no_relatives(parts, card):
    assert (len(parts.train), len(parts.held_out)) == (
        card["data"]["train_proteins"],
        card["data"]["heldout_proteins"],
    )
    rng = random.Random(0)
    held_out, train = rng.sample(parts.held_out, 40), rng.sample(parts.train, 2000)
    sequences = [protein.sequence for protein in held_out + train]
    pairs = near_relatives(sequences, queries=np.arange(40))
    assert ((pairs < 40).sum(axis=1) == 1).sum() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_as_the_card_says(name, parts, card):
    sequences = [protein.sequence for protein in parts.held_out[::10]]
    measured = perplexity(load_model(name, head=True).model, sequences)
    published = card["models"][name]["perplexity"]["value"]
    assert measured["low"] * 0.99 < published < measured["high"] * 1.01
    config = card["models"][name]["config"]
    untrained = new_model(config["n_layer"], config["n_embd"], config["n_head"], seed=1).eval()
    assert measured["high"] < 0.7 * perplexity(untrained, sequences[:50])["value"]
